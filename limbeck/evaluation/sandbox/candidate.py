"""The process that runs a program: it does what the tests ask for (see `tester`), and knows no test and no verdict."""

from __future__ import annotations

import errno
import operator
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any

from limbeck.evaluation.sandbox import tmpfs
from limbeck.evaluation.sandbox.jail import confine
from limbeck.evaluation.sandbox.wire import Link, decode, encode

# What may be done with an object that stays in this process.
DEEDS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "contains": operator.contains,
    "eq": operator.eq,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "iter": iter,
    "next": next,
}
_CHANGEABLE = (list, dict, set, bytearray, deque)


class Candidate:
    """A program's module, and what of it the tests hold by number."""

    def __init__(self) -> None:
        self.module = types.ModuleType("program")
        # Data classes, enumerations and pickles look their module up there.
        sys.modules["program"] = self.module
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}

    def keep(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return self.numbers[id(value)]

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. An argument that was changed in place goes back with it."""
        try:
            if message["do"] == "run":
                return self._run(message["source"])
            if message["do"] == "name":
                names = vars(self.module)
                there = message["name"] in names
                return {"value": encode(names[message["name"]], self.keep)} if there else {"absent": True}
            arguments = decode(message["arguments"], self.kept.__getitem__)
            named = decode(message["named"], self.kept.__getitem__)
            value = DEEDS[message["do"]](*arguments, **named)
            after = [encode(a, self.keep) if isinstance(a, _CHANGEABLE) else None for a in arguments]
            changed = {
                place: data
                for place, (data, before) in enumerate(zip(after, message["arguments"][1], strict=True))
                if data is not None and data != before
            }
            return {"value": encode(value, self.keep), "changed": changed}
        except BaseException as error:
            return _failure(error)

    def _run(self, source: str) -> dict[str, Any]:
        try:
            code = compile(source, "program.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            return _failure(error) | {"kind": "syntax"}
        exec(code, vars(self.module))
        return {}


def _failure(error: BaseException) -> dict[str, Any]:
    kind = {SystemExit: "exit", MemoryError: "memory"}.get(type(error), "exception")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        kind = "disk"
    return {"error": type(error).__name__, "text": str(error)[:300], "kind": kind}


def main() -> None:
    """Arguments: the package's folder, the two pipes, MiB of memory, seconds of processor, MiB of a file, and where it
    may write any: a folder, MiB of all its files, their number."""
    root, reading, writing, memory_mb, cpu_s, file_mb, *own = sys.argv[1:]
    link = Link(int(reading), int(writing))
    try:
        if own:
            tmpfs.mount(own[0], size_mb=int(own[1]), entries=int(own[2]))
        folder = own[0] if own else None
        confine(folder=folder, memory_mb=int(memory_mb), cpu_s=int(cpu_s), file_mb=int(file_mb))
    except OSError as error:
        link.send({"unconfined": str(error)})
        return
    sys.path.remove(root)
    link.send({"ready": True})
    candidate = Candidate()
    while (message := link.receive()) is not None:
        link.send(candidate.answer(message))
