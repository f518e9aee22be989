"""Console output while a run works: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

PLAIN_INTERVAL_S = 15.0
# Longer lines quote data; what matters stands at their beginning, and the remedy at their end.
_LONGEST_LINE, _TAIL = 2000, 500


def printable(text: str) -> str:
    """A text that may have come from a server or a file, without what a terminal or a log would take for a command.

    Control characters and those that turn the direction of writing are escaped, a long text loses its middle.
    """
    if len(text) > _LONGEST_LINE:
        left_out = len(text) - _LONGEST_LINE
        text = f"{text[: _LONGEST_LINE - _TAIL]} ... ({left_out:,} characters left out) ... {text[-_TAIL:]}"
    return "".join(ascii(c)[1:-1] if _commands(c) else c for c in text)


def on_one_line(text: str) -> str:
    """A printable text whose ends of lines are spelled out too, so that it cannot pass for a line of its own."""
    return printable(text).replace("\n", "\\n")


def _commands(c: str) -> bool:
    # Control characters, halves of a surrogate pair, ends of lines and paragraphs.
    if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"):
        return c not in "\n\t"
    return unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


class Meter(Protocol):
    """Counts work done in one stage."""

    def advance(self, amount: float, note: str = "") -> None: ...


class Console(Protocol):
    """Console of a run."""

    def say(self, line: str) -> None: ...

    def warn(self, line: str) -> None: ...

    def meter(self, label: str, total: float, unit: str, done: float = 0) -> AbstractContextManager[Meter]: ...


@dataclass
class _Pace:
    """Speed of work, from the end of its first piece on: before, a step is compiled, or a round written."""

    since: float | None = None
    fresh: float = 0.0

    def advance(self, amount: float, now: float) -> float | None:
        """Work per second so far; None before the first piece has ended."""
        if self.since is None:
            self.since = now
            return None
        self.fresh += amount
        return self.fresh / max(now - self.since, 1e-9) or None


@dataclass
class _PlainMeter:
    label: str
    total: float
    unit: str
    done: float
    file: TextIO | None = None
    pace: _Pace = field(default_factory=_Pace)
    spoken: float = field(default_factory=lambda: time.monotonic())

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        rate = self.pace.advance(amount, now)
        if now - self.spoken >= PLAIN_INTERVAL_S:
            self.spoken = now
            print(self.line(rate, note), file=self.file or sys.stderr, flush=True)

    def line(self, rate: float | None, note: str) -> str:
        share = 100 * self.done / self.total if self.total else 100.0
        parts = [f"{self.label}: {share:.0f} %", note]
        if rate:
            left = f"{format_seconds((self.total - self.done) / rate)} left"
            parts[1:1] = [_rate(rate, self.unit), left]
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class PlainConsole:
    """Lines on standard error, or into a file: for logs, pipes and batch systems."""

    file: TextIO | None = None

    def say(self, line: str) -> None:
        print(printable(line), file=self.file or sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        self.say(f"warning: {line}")

    @contextmanager
    def meter(self, label: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        yield _PlainMeter(label, total, unit, done, self.file)


@dataclass(frozen=True)
class QuietConsole:
    """Console that shows warnings alone: for the Python API and for ranks other than the first."""

    def say(self, line: str) -> None:
        del line

    def warn(self, line: str) -> None:
        print(printable(f"warning: {line}"), file=sys.stderr, flush=True)

    @contextmanager
    def meter(self, label: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        yield _SilentMeter()


class _SilentMeter:
    def advance(self, amount: float, note: str = "") -> None:
        del amount, note


class RichConsole:
    """A live bar with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal

        self._terminal = Terminal(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        self._terminal.print(printable(line), markup=False)

    def warn(self, line: str) -> None:
        self._terminal.print(printable(f"warning: {line}"), style="yellow", markup=False)

    @contextmanager
    def meter(self, label: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self._terminal, transient=True, expand=True) as progress:
            task = progress.add_task(label, total=total, completed=int(done), rate="", note="")
            pace = _Pace()

            class Live:
                def advance(self, amount: float, note: str = "") -> None:
                    rate = pace.advance(amount, time.monotonic())
                    progress.update(task, advance=amount, rate=_rate(rate, unit) if rate else "", note=note)

            yield Live()


def _rate(rate: float, unit: str) -> str:
    """A rate per second, with decimals where it is small: a step may take ten seconds."""
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


def default_console() -> Console:
    """Rich in a terminal, plain lines elsewhere."""
    return RichConsole() if sys.stderr.isatty() else PlainConsole()


def format_seconds(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 10 min."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if round(seconds, 1) < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
