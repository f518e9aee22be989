"""The tokenizer's own chat template: rendering, and where its answer begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from limbeck.flow import LimbeckError, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[dict[str, Any]]
Options = Mapping[str, Any]

_NO_THINKING = (
    "where the template has a switch for thinking, turn it off (prompts.chat_options={enable_thinking: false}), "
    "or let the teacher answer (responses.author=teacher)"
)


def require_options(options: Options, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the template reads every option: one that is misspelt would change nothing, silently.

    Raises:
        LimbeckError: it does not, or the option is one that limbeck sets itself.
    """
    template = str(tokenizer.chat_template)
    for name in options:
        if name in ("messages", "add_generation_prompt") or not re.search(rf"\b{re.escape(name)}\b", template):
            raise LimbeckError(
                f"prompts.chat_options has {name!r}, which is no variable of the chat template of "
                f"{tokenizer.name_or_path} that can be set; correct the name or leave it out"
            )


def turns_of(prompt: Prompt) -> Turns:
    """The conversation of a prompt; a text is one user turn."""
    assert prompt.messages or prompt.text is not None, f"prompt {prompt.id} has neither text nor messages"
    turns = prompt.messages or (Message(role="user", content=prompt.text or ""),)
    return [turn.as_turn() for turn in turns]


def render(
    conversations: Sequence[Turns],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    options: Options | None,
    *,
    ask: bool,
) -> list[str]:
    """The text of each conversation. Its ids without added special tokens are what apply_chat_template returns.

    Args:
        names: of the prompts, for messages.
        options: variables of the template.
        ask: end with the template's opening of an assistant turn.

    Raises:
        LimbeckError: the template refuses a conversation (Gemma: a system turn).
    """
    from jinja2 import TemplateError

    texts = []
    for name, conversation in zip(names, conversations, strict=True):
        try:
            text = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=ask, tokenize=False, **dict(options or {})
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn["role"] for turn in conversation)
            raise LimbeckError(
                f"prompt {name}: the chat template of {tokenizer.name_or_path} refuses the turns {roles} "
                f"({' '.join(str(error).split())}); change the conversation or use another template"
            ) from None
        assert isinstance(text, str)
        texts.append(text)
    return texts


def require_asked(name: str, tokenizer: PreTrainedTokenizerBase, turns: Turns, text: str) -> None:
    """Check that the rendered prompt holds the last user turn; templates of vision models leave plain text out.

    Raises:
        LimbeckError: it does not.
    """
    asked = turns[-1]["content"].strip()
    if asked not in text:
        raise LimbeckError(
            f"prompt {name}: the chat template of {tokenizer.name_or_path} drops or changes the user's text "
            f"{asked[:40]!r}; use template alpaca or plain, or a tokenizer whose template takes plain text"
        )


def text_after_answer(
    name: str, tokenizer: PreTrainedTokenizerBase, prompt: str, conversation: str, completion: str
) -> str:
    """What the template writes behind the completion, having checked that before it stands the rendered prompt.

    Raises:
        LimbeckError: it is not. Reasoning templates open the answer with a thought when they ask and leave it out, or
            write an empty one, when they tell: training on that would teach another format than the one sampled from.
    """
    where = f"prompt {name}: the chat template of {tokenizer.name_or_path}"
    if not conversation.startswith(prompt):
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, conversation, strict=False)) if a != b), len(conversation)
        )
        raise LimbeckError(
            f"{where} writes a prompt that does not begin its own conversation (from character {same} on: "
            f"{prompt[same : same + 30]!r} against {conversation[same : same + 30]!r}); {_NO_THINKING}"
        )
    answer = conversation[len(prompt) :].lstrip()
    if not answer.startswith(completion):
        raise LimbeckError(
            f"{where} changes the answer (got {answer[:40]!r}, expected {completion[:40]!r}); {_NO_THINKING}"
        )
    return answer[len(completion) :]
