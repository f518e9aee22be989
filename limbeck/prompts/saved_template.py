"""The chat template that a student is saved with: applying it gives the text that the student was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck.prompts.wording import alpaca_text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACE = "\0"
_ONLY_TWO_ROLES = "the Alpaca wording has user and assistant turns only"


def saved_chat_template(tokenizer: PreTrainedTokenizerBase, template: str, options: Mapping[str, Any] | None) -> Any:
    """The chat template for a student whose prompts were written with `template`.

    With "chat" it is the tokenizer's own, with `options` as defaults of its variables; with "alpaca" one that writes
    the Alpaca wording; with "plain", where a prompt is text as it stands, there is none.
    """
    if template == "chat":
        return _with_defaults(tokenizer.chat_template, options or {})
    return alpaca_chat_template(tokenizer) if template == "alpaca" else None


def alpaca_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Alpaca wording as a chat template that gives the ids of `encode_prompts(..., "alpaca")` for a user turn.

    None for a tokenizer that puts tokens behind a text: a template cannot leave them out of what it is asked to end.
    """
    encoded: Any = tokenizer("a")["input_ids"]
    inner: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    if list(encoded[len(encoded) - len(inner) :]) != list(inner):
        return None
    # What the tokenizer puts in front of a text, a template writes itself.
    opening = "".join(map(str, tokenizer.convert_ids_to_tokens(list(encoded[: len(encoded) - len(inner)]))))
    before, _, behind = alpaca_text_of(_PLACE, "").partition(_PLACE)
    return (
        f"{{{{ {opening!r} }}}}"
        "{% for turn in messages %}{% if turn['role'] == 'user' %}"
        f"{{{{ {before!r} + turn['content'] + {behind!r} }}}}"
        "{% elif turn['role'] == 'assistant' %}"
        f"{{{{ turn['content'] + {str(tokenizer.eos_token or '')!r} }}}}"
        "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
        f"{{% else %}}{{{{ raise_exception({_ONLY_TWO_ROLES!r}) }}}}{{% endif %}}{{% endfor %}}"
    )


def _with_defaults(template: Any, options: Mapping[str, Any]) -> Any:
    """The template with values for variables that its caller leaves out."""
    if isinstance(template, dict):
        return {name: _with_defaults(text, options) for name, text in template.items()}
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in sorted(options.items())
    )
    # The empty expression keeps Jinja from taking a line break at the template's start for that of the last block.
    return f"{defaults}{{{{ '' }}}}{template}" if defaults else template
