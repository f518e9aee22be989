"""The turns of a conversation that the model writes: the text of each assistant turn, with its end.

A turn is found by rendering the conversation before it, as in use, and the conversation up to it. Where the
whole conversation holds every turn just so, it is one response whose other tokens are context. Templates that write an
earlier turn otherwise than the last one (Qwen3 drops its thought, Mistral moves the tools) have no such text: there
each turn becomes a response of its own, asked exactly as the model would be.

A template with `{% generation %}` says itself what the assistant writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.prompts.chat import Rendering, text_after_answer, turns_of
from limbeck.prompts.ids import tokenize
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.tools import Turns
from limbeck.prompts.turn_ends import end_of_text, last_run
from limbeck.types import LimbeckError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedText:
    """A conversation as text, with the parts of it that the assistant writes, ascending: (start, end) in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]


def answer_of(prompt: Prompt) -> dict[str, Any]:
    """The reference answer as a turn, without white space around it: many templates drop that, and it would merge with
    the end of the prompt."""
    turn = prompt.answer.as_turn() if prompt.answer else {"role": "assistant", "content": str(prompt.completion)}
    return {**turn, "content": turn["content"].strip()}


def conversation_of(prompt: Prompt) -> Turns:
    """Prompt and reference answer as one conversation, without white space around the assistant's text."""
    turns = [*turns_of(prompt), answer_of(prompt)]
    return [{**t, "content": t["content"].strip()} if t["role"] == "assistant" else t for t in turns]


def _answered_places(turns: Turns) -> list[int]:
    """The places of the turns that the assistant is asked for; one that begins a conversation answers nothing."""
    return [place for place, turn in enumerate(turns) if turn["role"] == "assistant" and place]


def has_earlier_answers(prompt: Prompt) -> bool:
    """Whether the assistant has spoken before the turn that is asked for."""
    return any(turn.role == "assistant" for turn in prompt.messages or ())


def marked_texts(prompt: Prompt, rendering: Rendering, asked: str, *, every_turn: bool) -> list[MarkedText]:
    """The conversation of a prompt and its answer with every turn of the assistant marked, or the last one alone.

    Args:
        asked: the text of the prompt.
    """
    return _every_turn(prompt, rendering) if every_turn else [_last_turn(prompt, rendering, asked)]


def _last_turn(prompt: Prompt, rendering: Rendering, asked: str) -> MarkedText:
    """The conversation with its last turn marked, as far as the model would write it.

    Raises:
        LimbeckError: a template that changes or does not end what the assistant says, without marks of its own.
    """
    try:
        return _one_turn(prompt_label(prompt), [*turns_of(prompt), answer_of(prompt)], prompt, rendering, asked)
    except LimbeckError:
        if not marks_answers(rendering.tokenizer):
            raise
    every = marked(prompt, rendering)
    return MarkedText(text=every.text, spans=every.spans[-1:])


def _every_turn(prompt: Prompt, rendering: Rendering) -> list[MarkedText]:
    """The conversation with each of the assistant's turns marked once: whole where that can be, else turn by turn.

    One that begins the conversation is context: there is nothing that it could be asked by.

    Raises:
        LimbeckError: a blank turn of the assistant, or a template that changes or does not end what it says.
    """
    turns, name = conversation_of(prompt), prompt_label(prompt)
    places = _answered_places(turns)
    for place in places:
        if not turns[place]["content"] and not turns[place].get("tool_calls"):
            raise LimbeckError(
                f"prompt {name}: turn {place + 1} is a blank turn of the assistant, which would teach to say nothing; "
                "fill it in, remove the row, or set prompts.loss_on=last"
            )
    if marks_answers(rendering.tokenizer):
        return [marked(prompt, rendering)]
    single = []
    for place in places:
        asked = rendering.text(name, turns[:place], prompt.tools, ask=True)
        single.append(_one_turn(name, turns[: place + 1], prompt, rendering, asked))
    whole = rendering.text(name, turns, prompt.tools, ask=False)
    spans = tuple(one.spans[0] for one in single)
    if all(whole.startswith(one.text[: one.spans[0][1]]) for one in single):
        return [MarkedText(text=whole, spans=spans)]
    return single


def _one_turn(name: str, turns: Turns, prompt: Prompt, rendering: Rendering, asked: str) -> MarkedText:
    """A conversation whose last turn alone is marked, exactly as far as the model would write it.

    Args:
        asked: the text of the turns before it.
    """
    whole = rendering.text(name, turns, prompt.tools, ask=False)
    ending = text_after_answer(name, rendering, asked, whole, turns[-1])
    stop = len(whole) - len(ending) + end_of_text(f"prompt {name}: {rendering.where}", ending, rendering.control)
    return MarkedText(text=whole, spans=((len(asked), stop),))


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks the assistant's text itself."""
    template: Any = tokenizer.chat_template
    texts = template.values() if isinstance(template, Mapping) else [template]
    return any(_MARKER.search(str(text)) for text in texts)


def marked(prompt: Prompt, rendering: Rendering) -> MarkedText:
    """The conversation with what the template marks, less the opening that it writes itself when it asks, and what
    follows the end of the turn.

    Raises:
        LimbeckError: not one mark a turn, or a mark without the token that ends the turn.
    """
    turns, name = conversation_of(prompt), prompt_label(prompt)
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    text, marks = rendering.marks(name, turns, prompt.tools)
    # Phi-3's training template marks the end of the whole text too, which no turn is.
    while len(marks) > len(places) and last_run(text, rendering.control) == text[slice(*marks[-1])]:
        marks.pop()
    where = f"prompt {name}: {rendering.where}"
    if len(marks) != len(places):
        raise LimbeckError(
            f"{where} marks {len(marks)} parts as the assistant's ({{% generation %}}) where it has {len(places)} "
            "turns; repair the template, or use one without marks"
        )
    spans = []
    answered = _answered_places(turns)
    for place, (start, stop) in zip(answered, marks[-len(answered) :], strict=True):
        asked = rendering.text(name, turns[:place], prompt.tools, ask=True)
        if text.startswith(asked):
            start = min(max(start, len(asked)), stop)
        length = _last_end(text[start:stop], rendering.control)
        if length is None:
            raise LimbeckError(
                f"{where} marks an answer ({{% generation %}}) without the token that ends its turn, so the student "
                "could not learn to stop; move the token into the mark"
            )
        spans.append((start, start + length))
    return MarkedText(text=text, spans=tuple(spans))


def _last_end(text: str, control: Mapping[int, str]) -> int | None:
    """Characters up to and including the last control token, where nothing but white space follows it."""
    stripped = text.rstrip()
    ends = any(stripped.endswith(token) for token in control.values() if token)
    return len(stripped) if ends else None


def marked_tokens(
    every: Sequence[tuple[str, MarkedText]], rendering: Rendering
) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    """The ids of conversations as far as the assistant's last turn goes, each with its marked parts as (start, end).

    Args:
        every: name for messages, and the text.

    Raises:
        LimbeckError: the tokenizer merges the end of a prompt with the beginning of its answer.
    """
    edges = [[edge for span in one.spans for edge in span] for _, one in every]
    texts = [one.text[:edge] for (_, one), own in zip(every, edges, strict=True) for edge in own]
    cut = iter(tokenize(texts, rendering.tokenizer, special=False))
    found = []
    for (name, one), own in zip(every, edges, strict=True):
        begun = [next(cut) for _ in own]
        for edge, ids in zip(own, begun, strict=True):
            if begun[-1][: len(ids)] != ids:
                raise LimbeckError(
                    f"prompt {name}: the tokenizer merges the end of the prompt with the beginning of its answer "
                    f"{one.text[edge : edge + 20]!r}, so that the prompt's ids do not begin the conversation's; "
                    "change or drop the row"
                )
        lengths = [len(ids) for ids in begun]
        found.append((begun[-1], list(zip(lengths[::2], lengths[1::2], strict=True))))
    return found
