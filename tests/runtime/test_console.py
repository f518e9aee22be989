"""What a person sees: plain lines in a log, a bar in a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from limbeck.runtime import console
from limbeck.runtime.console import (
    PlainConsole,
    QuietConsole,
    RichConsole,
    default_console,
    format_seconds,
    on_one_line,
    printable,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (60, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


HOSTILE = "a\x1b[2J\x07\x9b1m\r\u2028\u202eb\ud800 ä\U0001f468\u200d\U0001f469 é\n\tend"
TAMED = r"a\x1b[2J\x07\x9b1m\r\u2028\u202eb\ud800 " + "ä\U0001f468\u200d\U0001f469 é\n\tend"


def test_what_a_terminal_would_obey_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a server's error or a file's name; what people write with stays as it is."""
    assert printable(HOSTILE) == TAMED
    for made in (PlainConsole(), QuietConsole(), RichConsole()):
        made.warn(HOSTILE)
    PlainConsole().say(HOSTILE)
    said = capsys.readouterr().err
    assert said.count(r"a\x1b[2J\x07\x9b1m\r\u2028\u202eb\ud800") == 4
    assert not set("\x1b\x07\x9b\r\u2028\u202e") & set(said)


def test_what_must_stay_on_its_line_has_no_end_of_line() -> None:
    assert on_one_line("a\nwarning: b\x1b[2J") == r"a\nwarning: b\x1b[2J"


def test_a_long_line_loses_its_middle() -> None:
    line = printable("what: " + "x" * 100_000 + "; the remedy")
    assert line.startswith("what: xxx") and line.endswith("xxx; the remedy") and len(line) < 2100
    assert "(98,018 characters left out)" in line
    assert printable("x" * 2000) == "x" * 2000


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console.time, "monotonic", made.monotonic)
    return made


class TestPlain:
    def test_a_line_now_and_then(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with PlainConsole().meter("train", 1000, "tokens", 200) as meter:
            # What came with the first step, such as the writing of a round, does not come with each.
            clock.now += 60
            meter.advance(100, "step 1")
            assert capsys.readouterr().err == "train: 30 % · step 1\n"
            clock.now += 10
            meter.advance(100)
            assert capsys.readouterr().err == ""
            clock.now += 10
            meter.advance(100, "step 3")
            # 500 of 1000 are there; 200 of them took 20 s, so 500 more take 50.
            assert capsys.readouterr().err == "train: 50 % · 10 tokens/s · 50 s left · step 3\n"
            clock.now += 1
            meter.advance(1)
            assert capsys.readouterr().err == ""

    def test_nothing_to_do(self, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with PlainConsole().meter("train", 0, "tokens") as meter:
            clock.now += 100
            meter.advance(0)
        assert capsys.readouterr().err == "train: 100 %\n"

    def test_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        PlainConsole().say("[bold] is no markup")
        PlainConsole().warn("careful")
        said = capsys.readouterr()
        assert said.err == "[bold] is no markup\nwarning: careful\n" and said.out == ""

    def test_quiet(self, capsys: pytest.CaptureFixture[str]) -> None:
        quiet = QuietConsole()
        quiet.say("nothing")
        with quiet.meter("train", 10, "tokens") as meter:
            meter.advance(5)
        quiet.warn("careful")
        assert capsys.readouterr().err == "warning: careful\n"


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard error is a terminal; the descriptor reads what it shows."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        yield ours
    os.close(ours)


def read_until(screen: int, last: str) -> str:
    """What a terminal shows up to some last words. One read may return less than has been written."""
    shown = b""
    while last.encode() not in shown and select.select([screen], [], [], 10)[0]:
        shown += os.read(screen, 1 << 16)
    return shown.decode()


class TestTerminal:
    def test_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with terminal(monkeypatch) as screen:
            chosen = default_console()
            assert isinstance(chosen, RichConsole)
            with chosen.meter("train [x]", 100, "tokens", 20) as meter:
                chosen.say("between [bold] lines")
                for _ in range(4):
                    time.sleep(0.02)
                    meter.advance(20, "step 1/4, loss 1.234")
            chosen.warn("careful")
            sys.stderr.flush()
            shown = read_until(screen, "warning: careful")
        for part in ("train [x]", "tokens/s", "100%", "loss 1.234", "between [bold] lines", "warning: careful"):
            assert part in shown

    def test_not_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert isinstance(default_console(), PlainConsole)
