"""A heartbeat of the first rank, for ranks that wait for files which it writes.

The first rank touches a file of the run directory every few seconds, whatever it works on; the others wait as long as
that goes on, and give up soon after it ends or where it is never seen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from limbeck.types import LimbeckError

INTERVAL_S = 2.0
# Without a sign. Network file systems show a change after some seconds.
LIMIT_S = 60.0
# The age of the last sign tells whether the first rank has died or works in another folder.
RECENT_S = 60.0
_POLL_S = 0.2


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """Touch a file every few seconds while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            # A full disk is reported by the next write that matters.
            with suppress(OSError):
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


def wait_until(ready: Callable[[], bool], *, sign: Path, rank: int) -> None:
    """Wait until the first rank has done its work, as long as its heartbeat goes on.

    Args:
        sign: the file that it touches.

    Raises:
        LimbeckError: there is no such file, or nothing has touched it for long.
    """
    last, since = _touched(sign), time.monotonic()
    # Touched just before this rank came to look: the first one was here, and may have died since.
    seen = last is not None and abs(time.time() - last / 1e9) < RECENT_S
    while not ready():
        time.sleep(_POLL_S)
        touched, now = _touched(sign), time.monotonic()
        if touched != last:
            last, since, seen = touched, now, True
        if now - since > LIMIT_S:
            raise LimbeckError(_why(sign, rank, seen))


def _touched(path: Path) -> int | None:
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
