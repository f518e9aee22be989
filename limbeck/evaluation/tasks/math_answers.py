"""Answers to mathematical problems: where they stand in a text, and whether two of them are the same number or formula.

The answer of a text is, in this order: the content of the last \\boxed{...}; what follows the last "####" on its line
(the number alone where one stands there, as in GSM8K); the last number. Equality is that of the package math-verify,
which reads LaTeX and compares with sympy. It runs in a process of its own (`mathworker`) that is ended where it takes
too long: 10^{10^{10}} is an answer too.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

Where = Literal["boxed", "hashes", "last number", "none"]
Verdict = Literal["equal", "different", "timeout"]

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
# The beginning of a box, a brace; a brace after a backslash is one of a set, and closes nothing.
_BOX = r"\\(?:boxed|fbox)\s*\{"
_BRACES = re.compile(rf"{_BOX}|\\(?!{_BOX}).|[{{}}]", re.DOTALL)
_INTEGER = re.compile(r"-?(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An answer and where in its text it stood."""

    answer: str
    where: Where


def extract(text: str) -> Found:
    """The answer that a text gives, see the head of this module."""
    boxed = last_boxed(text)
    if boxed is not None:
        return Found(answer=boxed.strip(), where="boxed")
    marked = re.findall(r"####[ \t]*(\S[^\n]*)", text)
    if marked:
        number = re.match(rf"\$?\s*({_NUMBER})", marked[-1])
        return Found(answer=number[1] if number else marked[-1].strip().rstrip("."), where="hashes")
    numbers = re.findall(_NUMBER, text)
    if numbers:
        return Found(answer=numbers[-1], where="last number")
    return Found(answer="", where="none")


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...} whose braces close; None where there is none."""
    # Where braces that are still open began; None for those of no box. One pass: a model may repeat itself without end.
    opened: list[int | None] = []
    last, end = -1, -1
    for token in _BRACES.finditer(text):
        if token.group() == "}":
            start = opened.pop() if opened else None
            if start is not None and start > last:
                last, end = start, token.start()
        elif token.group().endswith("{") and token.group() != "\\{":
            opened.append(token.end() if len(token.group()) > 1 else None)
    return text[last:end] if last >= 0 else None


def settled(reference: str, answer: str) -> bool | None:
    """Whether two answers are equal where no algebra is needed to see it: same text, or two integers; else None."""
    first, second = (" ".join(text.split()) for text in (reference, answer))
    if first == second:
        return bool(first)
    if not second:
        return False
    if _INTEGER.fullmatch(first) and _INTEGER.fullmatch(second):
        return first.replace(",", "") == second.replace(",", "")
    return None


@dataclass
class MathChecker:
    """Compares answers. A context manager: its process starts when it is first needed and ends with the block.

    Attributes:
        timeout_s: for one comparison; the first one also waits for the start.
    """

    timeout_s: float = 12.0
    start_s: float = 120.0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __enter__(self) -> MathChecker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def check(self, reference: str, answer: str) -> Verdict:
        """Compare an answer with the reference; "timeout" where that took too long or too much memory."""
        known = settled(reference, answer)
        if known is not None:
            return "equal" if known else "different"
        line = json.dumps({"reference": reference, "answer": answer}).encode() + b"\n"
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line)
        process.stdin.flush()
        said = _line(process.stdout.fileno(), self.timeout_s)
        if not said.endswith(b"\n"):
            self._end()
            return "timeout"
        return json.loads(said)["verdict"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "limbeck.evaluation.tasks.math_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert self._process.stdout is not None
            ready = _line(self._process.stdout.fileno(), self.start_s)
            if not ready:
                self._end()
                raise RuntimeError(f"{sys.executable} -m limbeck.evaluation.tasks.math_worker does not start")
        return self._process

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _line(pipe: int, timeout_s: float) -> bytes:
    """A line, or what has come of it when the time is up or the process has ended."""
    said, until = b"", time.monotonic() + timeout_s
    while not said.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return said
        part = os.read(pipe, 1 << 16)
        if not part:
            return said
        said += part
    return said
