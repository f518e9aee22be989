"""Transfer of values between the process of a program and that of its tests: as JSON, never as code or pickles.

Plain values (numbers, text, bytes, containers of the standard library, dates, fractions, decimals) go as themselves,
with their type; a subclass goes as what it is made from. Everything else stays where it is and goes as a number that
names it. Standard library alone.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

# Bytes of one message; the reader refuses more.
LONGEST = 32 << 20

_ROWS: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
_PAIRS: dict[type, str] = {dict: "dict", Counter: "Counter", OrderedDict: "OrderedDict"}
_BUILD: dict[str, Callable[[list], Any]] = {tag: kind for kind, tag in (_ROWS | _PAIRS).items()}
_BUILD["Counter"] = lambda pairs: Counter(dict(pairs))
# Values that are made anew from their type and the arguments it names itself.
_MADE = {
    "datetime": ("date", "datetime", "time", "timedelta"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
}
_BASES = (int, float, str, bytes, complex, bytearray, Counter, OrderedDict, dict, *_ROWS)


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """A value as JSON-able data.

    Args:
        keep: keeps what is no plain value and numbers it.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        # Python refuses to read decimal integers of more than 4300 digits.
        return value if value.bit_length() < 1024 else ["int", hex(value)]
    if kind in (bytes, bytearray):
        return [kind.__name__, value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is range:
        return ["range", value.start, value.stop, value.step]
    if kind in _ROWS:
        return [_ROWS[kind], [encode(item, keep) for item in value]]
    if kind in _PAIRS:
        return [_PAIRS[kind], [[encode(k, keep), encode(v, keep)] for k, v in value.items()]]
    if kind.__name__ in _MADE.get(kind.__module__, ()):
        return ["made", kind.__module__, kind.__name__, encode(value.__reduce_ex__(4)[1], keep)]
    if kind is defaultdict:
        return encode(dict(value), keep)
    for base in _BASES:
        if isinstance(value, base):
            return encode(base(value), keep)
    return ["kept", keep(value)]


def decode(data: Any, kept: Callable[[int], Any]) -> Any:
    """The value of `encode`; `kept` gives what a number names.

    Raises:
        ValueError: no such data.
    """
    if not isinstance(data, list):
        return data
    match data:
        case ["int", str(text)]:
            return int(text, 16)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case ["bytearray", str(text)]:
            return bytearray.fromhex(text)
        case ["complex", real, imaginary]:
            return complex(real, imaginary)
        case ["range", start, stop, step]:
            return range(start, stop, step)
        case ["made", str(module), str(name), arguments] if name in _MADE.get(module, ()):
            return getattr(importlib.import_module(module), name)(*decode(arguments, kept))
        case ["kept", int(number)]:
            return kept(number)
        case [str(tag), list(items)] if tag in _ROWS.values():
            return _BUILD[tag]([decode(item, kept) for item in items])
        case [str(tag), list(items)] if tag in _PAIRS.values():
            return _BUILD[tag]([(decode(k, kept), decode(v, kept)) for k, v in items])
    raise ValueError("no value of this protocol")


class Link:
    """Messages over two pipes, one JSON object per line."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._rest = reading, writing, b""

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._writing, line) :]

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where the other side has closed.

        Raises:
            ValueError: what came is no message.
        """
        parts, size = [self._rest], len(self._rest)
        while b"\n" not in parts[-1]:
            part = os.read(self._reading, 1 << 16)
            if not part:
                return None
            parts.append(part)
            size += len(part)
            if size > LONGEST:
                raise ValueError(f"a message of more than {LONGEST} bytes")
        line, _, self._rest = b"".join(parts).partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no message of this protocol")
        return message
