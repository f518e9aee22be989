"""Heartbeats of the ranks of a launch: each sees whether those that it waits for are alive.

Every rank touches a file of the run directory every few seconds, whatever it works on. The others wait for files that
the first one writes as long as that goes on, and give up soon after it ends or where it is never seen; before ranks
exchange anything, the first one waits for a sign of all others, and no longer than that.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from limbeck.types import LimbeckError, SaidElsewhere

INTERVAL_S = 2.0
# Without a sign. Network file systems show a change after some seconds.
LIMIT_S = 60.0
# The age of the last sign tells whether the first rank has died or works in another folder.
RECENT_S = 60.0
# A note of the first rank's end is young, of this launch perhaps, and believed if it is still there.
YOUNG_S, BELIEVED_S = 30.0, 15.0
# In which the first rank has said the same.
SAME_S = 10.0
_POLL_S = 0.2


@contextmanager
def beating(path: Path, *, below: Path | None = None, text: str = "") -> Iterator[None]:
    """Touch a file every few seconds while the block runs.

    Args:
        below: a directory that another rank makes: there are no signs before it has.
        text: the content of the file; empty leaves the one that it has.
    """
    if below is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()

    def beat() -> None:
        written = not text
        while not ended.is_set():
            # A full disk is reported by the next write that matters.
            with suppress(OSError):
                if below is not None and below.is_dir():
                    path.parent.mkdir(exist_ok=True)
                if not written:
                    path.write_text(text)
                    written = True
                path.touch()
            ended.wait(INTERVAL_S)

    # A daemon, so that the process can end at once.
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def leaving_word(note: Path) -> Iterator[None]:
    """Leave the error that the first rank ends with in a file, so that the others wait for no further sign of it."""
    note.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            note.parent.mkdir(exist_ok=True)
            note.write_text(str(error))
        raise


class LastWord:
    """The last word of the first rank (`leaving_word`), as another one sees it from its own start on.

    One that is there at the start may be of an earlier launch: the first rank removes it when it comes, and one that
    stays is believed after a while, if it is not an old one.
    """

    def __init__(self, path: Path):
        self._path, self._first, self._began = path, touched(path), time.monotonic()
        self._young = self._first is not None and abs(time.time() - self._first / 1e9) < YOUNG_S

    def left(self) -> bool:
        """Whether the first rank of this launch has ended with an error."""
        now = touched(self._path)
        if now != self._first:
            self._first, self._young = None, False
            return now is not None
        return now is not None and self._young and time.monotonic() - self._began > BELIEVED_S

    def text(self) -> str:
        with suppress(OSError, UnicodeDecodeError):
            return self._path.read_text()
        return ""


@contextmanager
def said_by_the_first_rank(word: LastWord) -> Iterator[None]:
    """Keep silent, on another rank, about an error that the first one ends with as well."""
    try:
        yield
    except SaidElsewhere:
        raise
    except LimbeckError as error:
        until = time.monotonic() + SAME_S
        while not word.left() and time.monotonic() < until:
            time.sleep(_POLL_S)
        if word.text() == str(error):
            raise SaidElsewhere(str(error)) from error
        raise


def wait_until(ready: Callable[[], bool], *, sign: Path, word: LastWord, rank: int) -> None:
    """Wait until the first rank has done its work, as long as its heartbeat goes on.

    Args:
        sign: the file that it touches.
        word: its last one.

    Raises:
        LimbeckError: there is no such file, or nothing has touched it for long.
        SaidElsewhere: the first rank has ended with an error.
    """
    last, since = touched(sign), time.monotonic()
    # Touched just before this rank came to look: the first one was here, and may have died since.
    seen = last is not None and abs(time.time() - last / 1e9) < RECENT_S
    while not ready():
        time.sleep(_POLL_S)
        if word.left():
            raise SaidElsewhere(f"rank 0 has ended: {word.text()}")
        sees, now = touched(sign), time.monotonic()
        if sees != last:
            last, since, seen = sees, now, True
        if now - since > LIMIT_S:
            raise LimbeckError(_why(sign, rank, seen))


def wait_for_signs(signs: Mapping[int, Path]) -> None:
    """Wait, on the first rank, until each other one has given a sign of life.

    Args:
        signs: the file that each of them touches, by its rank.

    Raises:
        LimbeckError: one of them gives none.
    """
    silent = silent_ranks(signs, LIMIT_S)
    if silent:
        root = next(iter(signs.values())).parent.parent
        raise LimbeckError(
            f"rank 0 has seen no sign of {ranks_in_words(silent)} in {root} for {LIMIT_S:.0f} s; look at what "
            f"{'they' if len(silent) > 1 else 'it'} said; all ranks need the same run directory: name one on a file "
            "system that every machine shares with output_dir=..., and start all ranks"
        )


def silent_ranks(signs: Mapping[int, Path], limit_s: float) -> list[int]:
    """The ranks that give no sign while this one waits; it waits no longer than all have given one."""
    before, began = {rank: touched(sign) for rank, sign in signs.items()}, time.monotonic()
    silent = list(signs)
    while silent and time.monotonic() - began < limit_s:
        time.sleep(_POLL_S)
        silent = [rank for rank in silent if touched(signs[rank]) in (None, before[rank])]
    return silent


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Numbers of ranks in a sentence."""
    some = ", ".join(map(str, ranks[:4]))
    return f"rank{'s' if len(ranks) > 1 else ''} {some}{' and more' if len(ranks) > 4 else ''}"


def touched(path: Path) -> int | None:
    """When a file was touched; opened, because network file systems look again only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _why(sign: Path, rank: int, seen: bool) -> str:
    root = sign.parent
    if seen:
        return (
            f"rank {rank} has seen no sign of rank 0 in {root} for {LIMIT_S:.0f} s, so it has ended or hangs; "
            "look at what it said, and start the same command again: nothing finished is lost"
        )
    return (
        f"rank {rank} does not see rank 0 work in {root} (waited {LIMIT_S:.0f} s); all ranks need the same run "
        "directory: name one on a file system that every machine shares with output_dir=..., and start all ranks"
    )
