"""What a row of a data set means: recognised by its fields, never by the name of the file.

    prompt [completion]                              text, or lists of messages (TRL)
    messages                                         a conversation; a last assistant turn is the completion
    conversations                                    the same in ShareGPT's words (from, value)
    instruction [input | context] [output | response] [instances]     Alpaca, Dolly, GPTeacher, self-instruct
    question [answer]     problem [solution]         GSM8K, MATH

Fields with null count as absent, other fields are ignored, `category` is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.flow import LimbeckError, Message

Row = Mapping[str, Any]
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
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What one row says: the prompt in exactly one of two forms, and the reference answer where there is one."""

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    instruction: tuple[str, str] | None = None
    completion: str | None = None
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
    for field in _READERS:
        if field in present:
            return field
    got = ", ".join(sorted(present)) or "none"
    raise LimbeckError(
        f"{where}: got the fields {got}, expected one of the formats {KNOWN_FORMATS}; "
        "rename the fields, or say which of them is the prompt (prompts.fields)"
    )


def read_row(row: Row, family: str, where: str) -> list[Example]:
    """The examples of one row: one, except for self-instruct's `instances`.

    Raises:
        LimbeckError: a blank prompt, or a field of the wrong type, naming the place.
    """
    return _READERS[family](row, where)


def rename_fields(row: Row, fields: Mapping[Mapped, str], where: str) -> Row:
    """The row as prompt/completion data, by the caller's map from `prompt`, `completion`, `category` to its fields."""
    missing = sorted(set(fields.values()) - set(row))
    if missing:
        raise LimbeckError(
            f"{where}: expected the field {missing[0]!r} that prompts.fields names, "
            f"got {', '.join(sorted(row)) or 'none'}; correct the name"
        )
    return {name: row[source] for name, source in fields.items()}


def _text(row: Row, field: str, where: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LimbeckError(f"{where}: expected text in {field!r}, got {type(value).__name__}; write it as a string")
    _require_unicode(value, field, where)
    return value


def _require_unicode(value: str, field: str, where: str) -> None:
    # JSON can spell half a surrogate pair; no tokenizer and no UTF-8 file can hold it.
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise LimbeckError(
            f"{where}: {field!r} holds half of a surrogate pair, which is no Unicode text; repair the row"
        )


def _prompt_text(row: Row, field: str, where: str) -> str:
    text = _text(row, field, where)
    if not text.strip():
        raise LimbeckError(f"{where}: got a blank {field!r}, expected a prompt; fill it in or remove the row")
    return text


def _answer(row: Row, *fields: str, where: str) -> str | None:
    for field in fields:
        text = _text(row, field, where)
        if text.strip():
            return text
    return None


def _category(row: Row) -> str | None:
    value = row.get("category")
    return str(value) if value not in (None, "") else None


def _turns(value: Any, field: str, where: str, role_key: str = "role", text_key: str = "content") -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        text = "text or " if field in ("prompt", "completion") else ""
        raise LimbeckError(
            f"{where}: got {_shown(value)} in {field!r}, expected {text}a list of messages, such as "
            f"[{{{role_key!r}: 'user', {text_key!r}: '...'}}]; rewrite the row"
        )
    turns = []
    for turn in value:
        role, content = (turn.get(role_key), turn.get(text_key)) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise LimbeckError(
                f"{where}: expected turns with {role_key!r} and {text_key!r} as text in {field!r}, got {_shown(turn)}; "
                "only text conversations are read"
            )
        _require_unicode(content, field, where)
        turns.append(Message(role=role, content=content))
    return turns


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _conversation(turns: list[Message], field: str, where: str) -> tuple[tuple[Message, ...], str | None]:
    """Split a conversation into the prompt and the last answer."""
    completion = None
    if turns[-1].role == "assistant":
        completion = turns[-1].content if turns[-1].content.strip() else None
        turns = turns[:-1]
    if not turns or turns[-1].role != "user":
        got = f"one that ends with {turns[-1].role!r}" if turns else "the answer alone"
        raise LimbeckError(
            f"{where}: expected a conversation in {field!r} with a user turn to answer, got {got}; repair it"
        )
    if not turns[-1].content.strip():
        raise LimbeckError(f"{where}: got a blank last user turn in {field!r}; fill it in or remove the row")
    return tuple(turns), completion


def _read_prompt(row: Row, where: str) -> list[Example]:
    value = row.get("prompt")
    if value is not None and not isinstance(value, str):
        messages, trailing = _conversation(_turns(value, "prompt", where), "prompt", where)
        if trailing is not None:
            raise LimbeckError(f"{where}: 'prompt' ends with an answer; put that turn into 'completion'")
        return [Example(messages=messages, completion=_completion(row, where), category=_category(row))]
    text = _prompt_text(row, "prompt", where)
    return [Example(text=text, completion=_completion(row, where), category=_category(row))]


def _completion(row: Row, where: str) -> str | None:
    value = row.get("completion")
    if value is None or isinstance(value, str):
        return _answer(row, "completion", where=where)
    turns = _turns(value, "completion", where)
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns)
        raise LimbeckError(
            f"{where}: expected one assistant turn in 'completion', got {roles}; move the others to 'prompt'"
        )
    return turns[0].content if turns[0].content.strip() else None


def _read_messages(row: Row, where: str) -> list[Example]:
    messages, completion = _conversation(_turns(row["messages"], "messages", where), "messages", where)
    return [Example(messages=messages, completion=completion, category=_category(row))]


def _read_conversations(row: Row, where: str) -> list[Example]:
    value = row["conversations"]
    # Some sets keep ShareGPT's field name but the role/content turns of `messages`.
    openai = isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]
    keys = ("role", "content") if openai else ("from", "value")
    turns = []
    for turn in _turns(value, "conversations", where, *keys):
        role = _SHAREGPT_ROLES.get(turn.role)
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise LimbeckError(f"{where}: got a turn from {turn.role!r}, expected one of {known}; rename the speaker")
        turns.append(Message(role=role, content=turn.content))
    messages, completion = _conversation(turns, "conversations", where)
    return [Example(messages=messages, completion=completion, category=_category(row))]


def instruction_example(
    instruction: str, given: str = "", completion: str | None = None, category: str | None = None
) -> Example:
    """Instruction data: the two parts apart, and joined by a blank line as the user would send them."""
    text = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Example(text=text, instruction=(instruction, given), completion=completion, category=category)


def _read_instruction(row: Row, where: str) -> list[Example]:
    instruction = _prompt_text(row, "instruction", where)
    instances = row.get("instances")
    if instances is None:
        return [_instance(instruction, row, row, where)]
    if not isinstance(instances, Sequence) or not all(isinstance(one, Mapping) for one in instances) or not instances:
        raise LimbeckError(f"{where}: expected a list of input/output pairs in 'instances', got {_shown(instances)}")
    return [_instance(instruction, one, row, where) for one in instances]


def _instance(instruction: str, given: Row, row: Row, where: str) -> Example:
    if _text(given, "input", where).strip() and _text(given, "context", where).strip():
        raise LimbeckError(f"{where}: got both 'input' and 'context', expected at most one; remove one of them")
    return instruction_example(
        instruction,
        _answer(given, "input", "context", where=where) or "",
        _answer(given, "output", "response", where=where),
        _category(row),
    )


def _question_reader(question: str, answer: str) -> Callable[[Row, str], list[Example]]:
    def read(row: Row, where: str) -> list[Example]:
        text = _prompt_text(row, question, where)
        return [instruction_example(text, "", _answer(row, answer, where=where), _category(row))]

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
