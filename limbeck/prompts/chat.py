"""The tokenizer's own chat template: rendering, and the place where the answer begins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from limbeck.models.processors import placeholder_of
from limbeck.prompts.special_tokens import special_tokens
from limbeck.prompts.tools import CallForm, Turns, require_tools
from limbeck.prompts.turn_ends import last_run
from limbeck.types import LimbeckError, Message, Prompt, is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Options = Mapping[str, Any]

# Fields of a turn that no service needs: its text is the same without them.
_UNSENT = ("name", "reasoning_content")
_PROBE_ANSWER = "A probe of the template."
_NO_THINKING = (
    "where the template has a switch for thinking, turn it off (prompts.chat_options={enable_thinking: false}), "
    "or let the teacher answer (responses.source=teacher)"
)


def require_options(options: Options, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the template reads every option: one that is misspelt would change nothing, silently.

    Raises:
        LimbeckError: it does not, or the option is one that limbeck sets itself.
    """
    for name in options:
        if not reads_option(name, tokenizer):
            raise LimbeckError(
                f"prompts.chat_options has {name!r}, which is no variable of the chat template of "
                f"{tokenizer.name_or_path} that can be set; correct the name or leave it out"
            )


def reads_option(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a variable of this name that a caller may set."""
    if name in ("messages", "add_generation_prompt"):
        return False
    return re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)) is not None


def turns_of(prompt: Prompt) -> Turns:
    """The conversation of a prompt; a text is one user turn."""
    assert prompt.messages or prompt.text is not None, f"prompt {prompt.id} has neither text nor messages"
    turns = prompt.messages or (Message(role="user", content=prompt.text or ""),)
    return [turn.as_turn() for turn in turns]


def beyond_text(prompt: Prompt) -> str | None:
    """What a prompt has that services are not sent: tools, or a field of a turn; None where `sent_turns` is all."""
    if prompt.tools:
        return "tools"
    fields = ((turn.role, name) for turn in prompt.messages or () for name in turn.fields)
    sent = (f"{name} in a turn of the {role}" for role, name in fields if name not in _UNSENT or role == "tool")
    return next(sent, None)


def sent_turns(prompt: Prompt) -> Turns:
    """The conversation of a prompt as it is sent to services: without names of speakers and earlier thoughts."""
    return [{name: held for name, held in turn.items() if name not in _UNSENT} for turn in turns_of(prompt)]


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A tokenizer's chat template at work.

    Attributes:
        options: variables of the template.
        form: how it reads calls of tools.
    """

    tokenizer: PreTrainedTokenizerBase
    options: Options
    form: CallForm = field(default_factory=CallForm)

    @cached_property
    def control(self) -> dict[int, str]:
        """The tokenizer's special tokens: id to spelling."""
        return special_tokens(self.tokenizer)

    @property
    def where(self) -> str:
        """Name of the template in messages."""
        return f"the chat template of {self.tokenizer.name_or_path}"

    def shaped(self, turns: Turns) -> Turns:
        """A conversation as the template reads it: those of image-text models read every content as blocks."""
        turns = self.form.shaped(turns)
        if placeholder_of(self.tokenizer) is None:
            return turns
        return [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn["content"], str)
            else turn
            for turn in turns
        ]

    def text(self, name: str, turns: Turns, tools: Sequence[Mapping[str, Any]], *, ask: bool) -> str:
        """The text of a conversation. Its ids without added special tokens are what apply_chat_template returns.

        Args:
            name: of the prompt, for messages.
            ask: end with the template's opening of an assistant turn.

        Raises:
            LimbeckError: the template refuses the conversation (Gemma: a system turn).
        """
        try:
            text = self.tokenizer.apply_chat_template(
                self.shaped(turns),
                tools=[dict(tool) for tool in tools] or None,  # type: ignore[arg-type]
                add_generation_prompt=ask,
                tokenize=False,
                **dict(self.options),
            )
        except Exception as error:  # a template is a program: it may divide by 0 or call itself for ever
            raise self._refused(name, turns, error) from None
        if not isinstance(text, str) or not is_unicode(text):
            raise LimbeckError(
                f"prompt {name}: {self.where} writes what is no Unicode text (half a surrogate pair); correct the "
                "template or use another"
            )
        return text

    def marks(self, name: str, turns: Turns, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and what the template marks as the assistant's (`{% generation %}`)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        offered: Any = [dict(tool) for tool in tools] or None
        try:
            found: Any = render_jinja_template(
                conversations=[self.shaped(turns)],
                tools=offered,
                chat_template=self.tokenizer.get_chat_template(tools=offered),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
        except Exception as error:  # as above
            raise self._refused(name, turns, error) from None
        (text,), (marks,) = found
        return text, [(start, stop) for start, stop in marks]

    def _refused(self, name: str, turns: Turns, error: Exception) -> LimbeckError:
        roles = ", ".join(str(turn["role"]) for turn in turns)
        return LimbeckError(
            f"prompt {name}: {self.where} refuses the turns {roles} "
            f"({' '.join(str(error).split())[:300]}); change the conversation or use another template"
        )

    @cached_property
    def usual_edges(self) -> tuple[str, str]:
        """Texts that the template writes before and behind an answer that is text alone, beside the prompt.

        Raises:
            LimbeckError: it refuses or drops an assistant's text.
        """
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE_ANSWER}]
        asked, text = self.text("probe", turns[:1], (), ask=True), self.text("probe", turns, (), ask=False)
        if _PROBE_ANSWER not in text:
            raise LimbeckError(
                f"{self.where} drops an assistant's text, so that its end cannot be found; use template alpaca or "
                "plain, or a tokenizer whose template takes plain text"
            )
        before, _, behind = text.rpartition(_PROBE_ANSWER)
        return before[len(asked) :] if before.startswith(asked) else "", behind


def require_asked(name: str, rendering: Rendering, prompt: Prompt, text: str) -> None:
    """Check that a rendered prompt holds the text of its turns, and the tools that it offers.

    Raises:
        LimbeckError: it does not; templates of vision models leave plain text out.
    """
    said_by = [
        (turn, said.strip())
        for turn in turns_of(prompt)
        for said in (
            [turn["content"]]
            if isinstance(turn["content"], str)
            else [part["text"] for part in turn["content"] if part["type"] == "text"]
        )
    ]
    for turn, said in said_by:
        if turn["role"] == "system":
            # Switches that Qwen3 and SmolLM3 read and take out.
            said = said.replace("/no_think", "").replace("/think", "").strip()
        if turn["role"] == "assistant" or said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text:
            continue
        whose = {"user": "user's", "tool": "tool's"}.get(turn["role"], f"{turn['role']} turn's")
        raise LimbeckError(
            f"prompt {name}: {rendering.where} drops or changes the {whose} text "
            f"{said[:40]!r}; use template alpaca or plain, or a tokenizer whose template takes plain text"
        )
    require_tools(name, rendering.tokenizer, prompt.tools, text)


def text_after_answer(name: str, rendering: Rendering, prompt: str, conversation: str, turn: Mapping[str, Any]) -> str:
    """Text that the template writes behind an answer, having checked that before it stands the rendered prompt.

    Raises:
        LimbeckError: it is not. Reasoning templates open the answer with a thought when they ask and leave it out, or
            write an empty one: training on that would teach another format than the one sampled from.
    """
    where = f"prompt {name}: {rendering.where}"
    if not conversation.startswith(prompt):
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, conversation, strict=False)) if a != b), len(conversation)
        )
        raise LimbeckError(
            f"{where} writes a prompt that does not begin its own conversation (from character {same} on: "
            f"{prompt[same : same + 30]!r} against {conversation[same : same + 30]!r}); {_NO_THINKING}"
        )
    answer, completion = conversation[len(prompt) :].lstrip(), str(turn["content"])
    thought = str(turn.get("reasoning_content", "")).strip()
    names = [str(call["function"]["name"]) for call in turn.get("tool_calls", ())]
    if not thought and not names:
        if not answer.startswith(completion):
            raise LimbeckError(
                f"{where} changes the answer (got {answer[:40]!r}, expected {completion[:40]!r}); {_NO_THINKING}"
            )
        return answer[len(completion) :]
    before, behind = rendering.usual_edges
    ending = behind if answer.endswith(behind) else last_run(answer, rendering.control)
    place = end = len(answer) - len(ending)
    # From behind, each before the one that follows it: a short text may stand in the thought or in the end token too.
    for what, part in reversed(
        [("thought", thought), ("text", completion), *(("call of", called) for called in names)]
    ):
        place = answer.rfind(part, 0, place)
        if place < 0:
            raise LimbeckError(
                f"{where} drops or changes the {what} {part[:40]!r} of an answer; use a tokenizer whose template "
                "writes it, or leave the row or the field out (prompts.ignore_columns=[messages.FIELD])"
            )
    if not names:
        return answer[answer.rfind(completion, 0, end) + len(completion) :]
    if not thought and before.strip() and answer.startswith(before.lstrip()):
        raise LimbeckError(f"{where} changes the answer (it begins with {before!r}, not in the data); {_NO_THINKING}")
    return ending
