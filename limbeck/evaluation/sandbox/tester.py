"""The process that tests a program. It runs the tests, never a line of the program: that runs in another process
(`candidate`), from which only values come. So the verdict, and what the tests expect, are out of the program's reach.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from limbeck.evaluation.sandbox.jail import confine
from limbeck.evaluation.sandbox.wire import Link, decode, encode


class ProgramFailed(BaseException):
    """The program cannot be asked any more, or ended itself. No test may catch it as one of its own errors."""


class Program:
    """The other process, as the tests use it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.failure: dict[str, str] | None = None
        # The exceptions are kept with what is known of them: a number of `id` is given anew to another otherwise.
        self.raised: dict[int, tuple[BaseException, dict[str, str]]] = {}

    def begin(self, source: str) -> None:
        """Have the program run, in a process that has said that it is confined."""
        first = self.link.receive() or {"unconfined": "its process ended at once"}
        if "ready" not in first:
            self._fail("unconfined", str(first["unconfined"]))
        self._ask({"do": "run", "source": source})

    def name(self, name: str) -> dict[str, Any]:
        """A global name of the program and its value; nothing where it has no such name."""
        answer = self._ask({"do": "name", "name": name})
        return {} if "absent" in answer else {name: self._decoded(answer.get("value"))}

    def do(self, deed: str, *arguments: Any, **named: Any) -> Any:
        given = {"arguments": encode(list(arguments), _number), "named": encode(named, _number)}
        answer = self._ask({"do": deed} | given)
        for place, data in answer.get("changed", {}).items():
            _change(arguments[int(place)], self._decoded(data))
        return self._decoded(answer.get("value"))

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.failure is not None:
            raise ProgramFailed
        try:
            self.link.send(message)
        except BrokenPipeError:
            self._fail("ended", "the process ended")
        answer = self._receive()
        if "error" in answer:
            raise self._exception(answer)
        return answer

    def _receive(self) -> dict[str, Any]:
        try:
            message = self.link.receive()
        except (ValueError, RecursionError) as error:
            self._fail("garbled", f"{type(error).__name__}: {error}"[:300])
        return self._fail("ended", "the process ended") if message is None else message

    def _decoded(self, data: Any) -> Any:
        try:
            return decode(data, lambda number: Remote(self, number))
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            self._fail("garbled", f"{type(error).__name__}: {error}"[:300])

    def _exception(self, answer: dict[str, Any]) -> BaseException:
        """The program's exception as one of Python's own: tests may expect it."""
        kind = answer.get("kind") if answer.get("kind") in ("exit", "memory", "disk", "syntax") else "exception"
        failure = {"kind": str(kind), "text": f"{answer['error']}: {answer.get('text', '')}"[:300]}
        if kind == "exit":
            self.failure = failure
            return ProgramFailed()
        named = getattr(builtins, str(answer["error"]), Exception)
        fitting = isinstance(named, type) and issubclass(named, Exception) and not issubclass(named, UnicodeError)
        error = (named if fitting else Exception)(str(answer.get("text", "")))
        self.raised[id(error)] = (error, failure)
        return error

    def _fail(self, kind: str, text: str) -> NoReturn:
        self.failure = {"kind": kind, "text": text}
        raise ProgramFailed


class Remote:
    """An object that stays with the program. It is never equal to a value: no class of the program's can say so."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.do("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.do("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.do("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._program.do("getitem", self, key)

    def __contains__(self, key: Any) -> bool:
        return bool(self._program.do("contains", self, key))

    def __len__(self) -> int:
        return self._program.do("len", self)

    def __bool__(self) -> bool:
        return self._program.do("bool", self) is True

    def __str__(self) -> str:
        return self._program.do("str", self)

    def __repr__(self) -> str:
        return self._program.do("repr", self)

    def __iter__(self) -> Iterator[Any]:
        return self._program.do("iter", self)

    def __next__(self) -> Any:
        return self._program.do("next", self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remote):
            return False
        return self._number == other._number or self._program.do("eq", self, other) is True

    def __hash__(self) -> int:
        return hash(self._number)


def _number(value: Any) -> int:
    if not isinstance(value, Remote):
        raise TypeError(f"the tests hand a {type(value).__name__} to the program; only plain values can go there")
    return value._number


def _change(argument: Any, now: Any) -> None:
    """Do to an argument of the tests what the program did to its copy."""
    if isinstance(argument, dict | set):
        argument.clear()
        argument.update(now)
    elif isinstance(argument, bytearray | list):
        argument[:] = now
    else:
        argument.clear()
        argument.extend(now)


def verdict_on(program: Program, job: dict[str, Any]) -> dict[str, str]:
    """The verdict on a program: kind and text."""
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        program.begin(job["program"])
        exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), names)
        for name in job["names"]:
            names.pop(name, None)
            names |= program.name(name)
        exec(compile(job["tests"], "tests.py", "exec", dont_inherit=True), names)
    except BaseException as error:
        if program.failure is None:
            kind = {AssertionError: "wrong", MemoryError: "memory"}.get(type(error), "exception")
            own = {"kind": kind, "text": f"{type(error).__name__}: {error}"[:300]}
            return program.raised[id(error)][1] if id(error) in program.raised else own
    return program.failure or {"kind": "passed", "text": ""}


def main() -> None:
    """Arguments: the package's folder, the two pipes, MiB of memory, seconds of processor. The job comes as input."""
    root, reading, writing, memory_mb, cpu_s = sys.argv[1:]
    job = json.load(sys.stdin)
    verdict = os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    confine(folder=None, memory_mb=int(memory_mb), cpu_s=int(cpu_s), file_mb=1)
    sys.path.remove(root)
    os.write(verdict, json.dumps(verdict_on(Program(Link(int(reading), int(writing))), job)).encode())
