"""The values of a row's fields, each refused with its place where it is of the wrong type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from limbeck.prompts.image_blocks import blocks_in
from limbeck.types import LimbeckError, Message, is_unicode

Row = Mapping[str, Any]
# What a turn may hold beside role and text, for the chat template.
TURN_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content")


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
    require_unicode(value, field, where)
    return value


def prompt_in(row: Row, field: str, where: str) -> str:
    """The text of a field that must not be blank.

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
                    f"{where}: expected text or a list of texts in {field!r}, got {shown_value(value)}; "
                    "write each answer as a string"
                )
            texts = tuple(value)
        else:
            texts = (text_in(row, field, where),)
        for text in texts:
            require_unicode(text, field, where)
        answers = tuple(text for text in texts if text.strip())
        if answers:
            return answers
    return ()


def category_of(row: Row, where: str) -> str | None:
    """The field `category` as text.

    Raises:
        LimbeckError: text that is no Unicode.
    """
    value = row.get("category")
    if value in (None, "", [], {}):
        return None
    require_unicode(text := str(value), "category", where)
    return text


def turns_in(value: Any, field: str, where: str, role_key: str = "role", text_key: str = "content") -> list[Message]:
    """A conversation.

    Raises:
        LimbeckError: no list of turns, or turns that are not text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        text = "text or " if field in ("prompt", "completion") else ""
        raise LimbeckError(
            f"{where}: got {shown_value(value)} in {field!r}, expected {text}a list of messages, such as "
            f"[{{{role_key!r}: 'user', {text_key!r}: '...'}}]; rewrite the row"
        )
    return [_turn(turn, field, where, role_key, text_key) for turn in value]


def _turn(turn: Any, field: str, where: str, role_key: str, text_key: str) -> Message:
    role, content, more = None, None, {}
    if isinstance(turn, Mapping):
        role, content = turn.get(role_key), turn.get(text_key)
        more = {name: turn[name] for name in TURN_FIELDS if turn.get(name) not in (None, "", [], ())}
    if "tool_calls" in more:
        more["tool_calls"] = _tool_calls(more["tool_calls"], field, where)
        content = "" if content is None else content
    parts = blocks_in(content, field, where)
    if parts is not None:
        content = "\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or not isinstance(content, str):
        raise LimbeckError(
            f"{where}: expected turns with {role_key!r} and {text_key!r} as text in {field!r}, "
            f"got {shown_value(turn)}; "
            "only text conversations are read"
        )
    for name in more.keys() - {"tool_calls"}:
        if not isinstance(more[name], str):
            raise LimbeckError(
                f"{where}: expected text in {name!r} of a turn in {field!r}, got {shown_value(more[name])}"
            )
    for text in (role, content, *texts_in(more)):
        require_unicode(text, field, where)
    with_image = parts is not None and not all(isinstance(part, str) for part in parts)
    return Message(role=role, content=content, fields=more, parts=parts if parts and with_image else ())


def _tool_calls(value: Any, field: str, where: str) -> list[dict[str, Any]]:
    """Calls of tools in the one form that templates read: a function with its arguments as an object, never as text."""
    calls: list[dict[str, Any]] = []
    call: Any
    for call in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        function: Any = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        arguments = _as_json(function.get("arguments") or {}) if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise LimbeckError(
                f"{where}: got {shown_value(call)} in 'tool_calls' of {field!r}, expected a name and arguments, "
                "such as {'type': 'function', 'function': {'name': '...', 'arguments': {...}}}; rewrite the row"
            )
        named = {
            key: call[key] for key in (call if "function" in call else ("id", "type")) if call.get(key) is not None
        }
        inner = {key: inner for key, inner in function.items() if "function" in call or key not in ("id", "type")}
        calls.append({"type": "function", **named, "function": {**inner, "arguments": dict(arguments)}})
    return calls


def tools_in(row: Row, where: str) -> tuple[Mapping[str, Any], ...]:
    """The schemas of the tools that a row offers, as a list or as JSON; none where there is no column `tools`.

    Raises:
        LimbeckError: anything but a list of objects.
    """
    value = _as_json(row.get("tools"))
    if value is None or value == "":
        return ()
    tools: list[Any] = [None]
    if isinstance(value, Sequence) and not isinstance(value, str):
        tools = [_as_json(tool) for tool in value]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise LimbeckError(
            f"{where}: got {shown_value(value)} in 'tools', expected a list of schemas, such as "
            "[{'type': 'function', 'function': {'name': '...', 'parameters': {...}}}]; rewrite the row"
        )
    for text in texts_in(tools):
        require_unicode(text, "tools", where)
    return tuple(tools)


def _as_json(value: Any) -> Any:
    """The value that a text spells as JSON; the value itself where it is no such text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def texts_in(value: Any) -> list[str]:
    """Every text inside nested lists and objects, names of fields included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, inner in value.items() for text in (str(key), *texts_in(inner))]
    return [text for inner in value for text in texts_in(inner)] if isinstance(value, Sequence) else []


def quoted(name: str) -> str:
    """A column's name as messages and the console show it: JSON can spell what no terminal can."""
    return name if name.isprintable() and is_unicode(name) else ascii(name)


def shown_value(value: Any) -> str:
    """A value as messages quote it."""
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    if not is_unicode(text):
        text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def require_unicode(value: str, field: str, where: str) -> str:
    """The text itself.

    Raises:
        LimbeckError: it holds half of a surrogate pair.
    """
    if not is_unicode(value):
        raise LimbeckError(
            f"{where}: {field!r} holds half of a surrogate pair, which is no Unicode text; repair the row"
        )
    return value
