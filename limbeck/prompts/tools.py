"""Calls of tools in a conversation, in the form that a tokenizer's chat template reads.

Templates differ in two things that data does not know of: whether arguments are an object (Qwen, Llama) or JSON text
(DeepSeek), and whether a turn that only calls has no content or an empty one. A template that is given the other form
doubles quotes or leaves the call out, and says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.types import LimbeckError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[dict[str, Any]]

# Nine letters and digits: Mistral's template refuses other ids.
_CALL = {
    "id": "probe0001",
    "type": "function",
    "function": {"name": "probe_tool", "arguments": {"probe_key": "a probe"}},
}


@dataclass(frozen=True)
class CallForm:
    """Form in which a template reads a turn that calls tools.

    Attributes:
        as_text: arguments as JSON text.
        content: of a turn that says nothing beside.
    """

    as_text: bool = False
    content: str | None = ""

    def shaped(self, turns: Turns) -> Turns:
        """A conversation with its calls in this form."""
        return [self._shaped(turn) if turn.get("tool_calls") else turn for turn in turns]

    def _shaped(self, turn: dict[str, Any]) -> dict[str, Any]:
        calls = turn["tool_calls"]
        if self.as_text:
            calls = [
                {
                    **c,
                    "function": {
                        **c["function"],
                        "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for c in calls
            ]
        return {**turn, "content": turn["content"] or self.content, "tool_calls": calls}


_FORMS = tuple(CallForm(as_text, content) for as_text in (False, True) for content in ("", None))


def call_form(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> CallForm:
    """The form that the tokenizer's template reads, found by rendering one call; the first where no tool is called.

    Raises:
        LimbeckError: the template writes a call in none.
    """
    if not any("tool_calls" in turn.fields for p in prompts for turn in (*(p.messages or ()), p.answer) if turn):
        return _FORMS[0]
    for form in _FORMS:
        if _writes(form, tokenizer, options):
            return form
    raise LimbeckError(
        f"the chat template of {tokenizer.name_or_path} does not write calls of tools, which the data's conversations "
        "hold; use a tokenizer whose template does, or leave those rows out"
    )


def _writes(form: CallForm, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> bool:
    """Whether a template writes name and arguments of a call, these neither quoted nor as Python has them."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    try:
        text = str(tokenizer.apply_chat_template(form.shaped(turns), tokenize=False, **options))
    except Exception:  # whatever a template raises for a form that it does not read
        return False
    written = all(part in text for part in ("probe_tool", "probe_key", "a probe"))
    return written and '\\"probe_key' not in text and "'probe_key'" not in text


def require_tools(name: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]], text: str) -> None:
    """Check that a rendered prompt offers every tool.

    Raises:
        LimbeckError: the template leaves one out.
    """
    for tool in tools:
        function = tool.get("function", tool)
        called = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(called, str) or called not in text:
            raise LimbeckError(
                f"prompt {name}: the chat template of {tokenizer.name_or_path} leaves out the tool {called!r}; use a "
                "tokenizer whose template writes tools, or leave them out on purpose: prompts.ignore_columns=[tools]"
            )
