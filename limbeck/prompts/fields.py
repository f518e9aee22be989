"""The values of a row's fields, each refused with its place where it is of the wrong type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from limbeck.flow import LimbeckError, Message, is_unicode

Row = Mapping[str, Any]


def text_in(row: Row, field: str, where: str) -> str:
    """The text of a field; empty where it is absent or null.

    Raises:
        LimbeckError: anything but text.
    """
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LimbeckError(f"{where}: expected text in {field!r}, got {type(value).__name__}; write it as a string")
    _require_unicode(value, field, where)
    return value


def prompt_in(row: Row, field: str, where: str) -> str:
    """The same of a field that must say something.

    Raises:
        LimbeckError: a blank one.
    """
    text = text_in(row, field, where)
    if not text.strip():
        raise LimbeckError(f"{where}: got a blank {field!r}, expected a prompt; fill it in or remove the row")
    return text


def are_texts(value: object) -> TypeGuard[Sequence[str]]:
    """Whether a value is a list of at least one text and nothing else."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(one, str) for one in value)
    )


def answers_in(row: Row, *fields: str, where: str) -> tuple[str, ...]:
    """The reference answers in the first of some fields that holds any; blank ones count as none.

    Raises:
        LimbeckError: neither text nor a list of texts.
    """
    for field in fields:
        value = row.get(field)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if value and not are_texts(value):
                raise LimbeckError(
                    f"{where}: expected text or a list of texts in {field!r}, got {shown(value)}; "
                    "write each answer as a string"
                )
            texts = tuple(value)
        else:
            texts = (text_in(row, field, where),)
        for text in texts:
            _require_unicode(text, field, where)
        answers = tuple(text for text in texts if text.strip())
        if answers:
            return answers
    return ()


def category_of(row: Row) -> str | None:
    """The field `category` as text."""
    value = row.get("category")
    return str(value) if value not in (None, "") else None


def turns_in(value: Any, field: str, where: str, role_key: str = "role", text_key: str = "content") -> list[Message]:
    """A conversation.

    Raises:
        LimbeckError: no list of turns, or turns that are not text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        text = "text or " if field in ("prompt", "completion") else ""
        raise LimbeckError(
            f"{where}: got {shown(value)} in {field!r}, expected {text}a list of messages, such as "
            f"[{{{role_key!r}: 'user', {text_key!r}: '...'}}]; rewrite the row"
        )
    turns = []
    for turn in value:
        role, content = (turn.get(role_key), turn.get(text_key)) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise LimbeckError(
                f"{where}: expected turns with {role_key!r} and {text_key!r} as text in {field!r}, got {shown(turn)}; "
                "only text conversations are read"
            )
        _require_unicode(content, field, where)
        turns.append(Message(role=role, content=content))
    return turns


def shown(value: Any) -> str:
    """A value as messages quote it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _require_unicode(value: str, field: str, where: str) -> None:
    if not is_unicode(value):
        raise LimbeckError(
            f"{where}: {field!r} holds half of a surrogate pair, which is no Unicode text; repair the row"
        )
