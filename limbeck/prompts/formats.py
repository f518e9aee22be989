"""Formats of data sets: recognised by the fields of a row, never by the name of the file.

    prompt [completion]                              text, or lists of messages (TRL)
    messages                                         a conversation; a last assistant turn is the completion
    images | image                                   beside any of them, for models that read images (prompts.images)
    conversations                                    the same in ShareGPT's words (from, value)
    instruction [input | context] [output | response] [instances]     Alpaca, Dolly, GPTeacher, self-instruct
    question [answer]     problem [solution]         GSM8K, MATH

An answer may be a list of texts: several references of one prompt, the first of which is trained on. Fields with null
count as absent, `category` is kept, `tools` are offered to the model; other fields are counted (prompts.columns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from limbeck.prompts.fields import (
    Row,
    answers_in,
    are_texts,
    category_of,
    prompt_in,
    quoted,
    shown_value,
    text_in,
    tools_in,
    turns_in,
)
from limbeck.types import LimbeckError, Message

Mapped = Literal["prompt", "completion", "category"]

KNOWN_FORMATS = (
    "prompt[+completion], messages, conversations, instruction[+input|context][+output|response], "
    "question[+answer], problem[+solution]"
)
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of data: the prompt in exactly one of two forms, and the reference answers where there are some.

    Attributes:
        completion: the reference answer, the first of several.
        references: all of them, where there are several; else empty.
        answer: the reference answer as a turn, where it is more than text.
        tools: schemas of the tools that the prompt offers.
        columns: further columns of the row that the teacher sees.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    instruction: tuple[str, str] | None = None
    completion: str | None = None
    references: tuple[str, ...] = ()
    answer: Message | None = None
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    category: str | None = None


def family_of(row: Row, where: str) -> str:
    """The field that names the row's format.

    Where a row fits several, the one that says more wins: UltraChat carries its first turn as `prompt` beside
    `messages`, MiniLLM's files carry the worded template as `prompt` beside `instruction`.

    Raises:
        LimbeckError: none of the known formats, naming the fields found.
    """
    present = {name for name, value in row.items() if value is not None}
    if {"prompt", "completion"} <= present:
        return "prompt"
    for name in _READERS:
        if name in present:
            return name
    got = ", ".join(quoted(name) for name in sorted(present)) or "none"
    raise LimbeckError(
        f"{where}: got the fields {got}, expected one of the formats {KNOWN_FORMATS}; "
        "rename the fields, or say which of them is the prompt (prompts.fields)"
    )


def read_row(row: Row, family: str, where: str, *, images: bool = False) -> list[Example]:
    """The examples of one row: one, except for self-instruct's `instances`.

    Args:
        images: let turns hold images.

    Raises:
        LimbeckError: a blank prompt, or a field of the wrong type, naming the place.
    """
    examples, tools = _READERS[family](row, where), tools_in(row, where)
    if not images and any(
        turn.parts for example in examples for turn in (*(example.messages or ()), example.answer) if turn
    ):
        raise LimbeckError(
            f"{where}: a turn holds an image, and only text conversations are read; take a teacher and a student that "
            "read images, or drop the row"
        )
    return [replace(example, tools=tools) for example in examples] if tools else examples


def rename_fields(row: Row, fields: Mapping[Mapped, str], where: str) -> Row:
    """The row as prompt/completion data, by the caller's map from `prompt`, `completion`, `category` to its fields."""
    missing = sorted(set(fields.values()) - set(row))
    if missing:
        raise LimbeckError(
            f"{where}: expected the field {missing[0]!r} that prompts.fields names, "
            f"got {', '.join(quoted(name) for name in sorted(row)) or 'none'}; correct the name"
        )
    return {name: row[source] for name, source in fields.items()}


def _conversation(turns: list[Message], field: str, where: str) -> tuple[tuple[Message, ...], Message | None]:
    """Split a conversation into the prompt and the last answer."""
    last = None
    if turns[-1].role == "assistant":
        last = turns[-1] if _answers(turns[-1]) else None
        turns = turns[:-1]
    if not turns or turns[-1].role not in ("user", "tool"):
        got = f"one that ends with {shown_value(turns[-1].role)}" if turns else "the answer alone"
        raise LimbeckError(
            f"{where}: expected a conversation in {field!r} with a user turn to answer, got {got}; repair it"
        )
    if not turns[-1].content.strip() and not turns[-1].parts:
        raise LimbeckError(
            f"{where}: got a blank last {turns[-1].role} turn in {field!r}; fill it in or remove the row"
        )
    return tuple(turns), last


def _answers(turn: Message) -> bool:
    """Whether an assistant's turn says, shows or calls anything."""
    return bool(turn.content.strip() or turn.parts) or "tool_calls" in turn.fields


def _with_answer(example: Example, turn: Message | None) -> Example:
    """An example with its last turn as the reference answer."""
    if turn is None:
        return example
    text = turn.content if turn.content.strip() else None
    return replace(example, completion=text, answer=turn if turn.fields or turn.parts else None)


def _read_prompt(row: Row, where: str) -> list[Example]:
    value = row.get("prompt")
    if value is not None and not isinstance(value, str):
        messages, trailing = _conversation(turns_in(value, "prompt", where), "prompt", where)
        if trailing is not None:
            raise LimbeckError(f"{where}: 'prompt' ends with an answer; put that turn into 'completion'")
        example = Example(messages=messages, category=category_of(row, where))
    else:
        example = Example(text=prompt_in(row, "prompt", where), category=category_of(row, where))
    completion = row.get("completion")
    if completion is None or isinstance(completion, str) or are_texts(completion):
        return [_answered(example, answers_in(row, "completion", where=where))]
    return [_with_answer(example, _completion(completion, where))]


def _answered(example: Example, answers: Sequence[str]) -> Example:
    """An example with its reference answers, as `Example` keeps them."""
    references = tuple(answers) if len(answers) > 1 else ()
    return replace(example, completion=answers[0] if answers else None, references=references)


def _completion(value: Any, where: str) -> Message | None:
    turns = turns_in(value, "completion", where)
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(shown_value(turn.role) for turn in turns[:4])
        raise LimbeckError(
            f"{where}: expected one assistant turn in 'completion', got {roles}; move the others to 'prompt'"
        )
    return turns[0] if _answers(turns[0]) else None


def _read_messages(row: Row, where: str) -> list[Example]:
    messages, last = _conversation(turns_in(row["messages"], "messages", where), "messages", where)
    return [_with_answer(Example(messages=messages, category=category_of(row, where)), last)]


def _read_conversations(row: Row, where: str) -> list[Example]:
    value = row["conversations"]
    # Some sets keep ShareGPT's field name but the role/content turns of `messages`.
    openai = isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]
    keys = ("role", "content") if openai else ("from", "value")
    turns = []
    for turn in turns_in(value, "conversations", where, *keys):
        role = _SHAREGPT_ROLES.get(turn.role)
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise LimbeckError(
                f"{where}: got a turn from {shown_value(turn.role)}, expected one of {known}; rename the speaker"
            )
        turns.append(replace(turn, role=role))
    messages, last = _conversation(turns, "conversations", where)
    return [_with_answer(Example(messages=messages, category=category_of(row, where)), last)]


def instruction_example(instruction: str, given: str = "", category: str | None = None) -> Example:
    """Instruction data: the two parts apart, and joined by a blank line as the user would send them."""
    text = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Example(text=text, instruction=(instruction, given), category=category)


def _read_instruction(row: Row, where: str) -> list[Example]:
    instruction = prompt_in(row, "instruction", where)
    instances = row.get("instances")
    if instances is None:
        return [_instance(instruction, row, row, where)]
    if not isinstance(instances, Sequence) or not all(isinstance(one, Mapping) for one in instances) or not instances:
        raise LimbeckError(
            f"{where}: expected a list of input/output pairs in 'instances', got {shown_value(instances)}"
        )
    return [_instance(instruction, one, row, where) for one in instances]


def _instance(instruction: str, given: Row, row: Row, where: str) -> Example:
    parts = [text for field in ("input", "context") if (text := text_in(given, field, where)).strip()]
    if len(parts) > 1:
        raise LimbeckError(f"{where}: got both 'input' and 'context', expected at most one; remove one of them")
    example = instruction_example(instruction, "".join(parts), category=category_of(row, where))
    return _answered(example, answers_in(given, "output", "response", where=where))


def _question_reader(question: str, answer: str) -> Callable[[Row, str], list[Example]]:
    def read(row: Row, where: str) -> list[Example]:
        text = prompt_in(row, question, where)
        example = instruction_example(text, category=category_of(row, where))
        return [_answered(example, answers_in(row, answer, where=where))]

    return read


# In the order in which they are tried.
_READERS: dict[str, Callable[[Row, str], list[Example]]] = {
    "messages": _read_messages,
    "conversations": _read_conversations,
    "instruction": _read_instruction,
    "question": _question_reader("question", "answer"),
    "problem": _question_reader("problem", "solution"),
    "prompt": _read_prompt,
}
