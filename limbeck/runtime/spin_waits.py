"""Threads of a parallel operation that wait for each other without spinning, while other processes want their cores.

At the end of every parallel operation its threads wait for the slowest. GNU's OpenMP, which torch's Linux wheels bring,
lets them spin for some milliseconds, because sleeping and waking takes longer than most operations. Beside a busy
process that is a disaster: the thread waited for is the one that has no core, and those that spin keep it from theirs.
On two cores, decoding ran at 26 % of its speed beside one busy process and at 4 % beside two; with short spins at 92 %
and 45 %. Short spins alone cost a tenth of the quiet speed of small batches, so they are for as long as they help.

The switch is libgomp's own rule: while a process has more OpenMP threads than cores, they spin hardly at all
(https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). Some more threads that do nothing are held for as long
as this process waits for cores. Which thread computes what stays the same, and so does every bit of the results.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

LOOK_INTERVAL_S = 0.5
# Seconds that the threads together wait for a core in a second: from here on another process wants it, and as long as
# there was more than the second number within the last seconds.
BUSY, QUIET = 0.1, 0.03
QUIET_S = 5.0


@contextmanager
def short_spins_when_busy() -> Iterator[None]:
    """Look, while the block runs, whether the threads of this process get their cores; hold more where they do not."""
    if not _readable():
        yield
        return
    ended = threading.Event()
    # A daemon, so that the process can end at once.
    thread = threading.Thread(target=_watch, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(ended: threading.Event) -> None:
    watch, last, waited = SpinWatch(), time.monotonic(), waited_s()
    spare: SpareThreads | None = None
    try:
        while not ended.wait(LOOK_INTERVAL_S):
            now, total = time.monotonic(), waited_s()
            busy = watch.busy((total - waited) / (now - last), now)
            last, waited = now, total
            if busy and spare is None:
                spare = spare_threads()
            elif not busy and spare is not None:
                spare.release()
                spare = None
    finally:
        if spare is not None:
            spare.release()


@dataclass
class SpinWatch:
    """Detects a busy machine by how long threads waited for a core."""

    _until: float = field(default=0.0, init=False)

    def busy(self, share: float, now: float) -> bool:
        """Whether the machine is busy.

        Args:
            share: seconds that all threads together waited for a core, for each second since the last look.
            now: monotonic seconds.
        """
        if share > BUSY or (share > QUIET and now < self._until):
            self._until = now + QUIET_S
        return now < self._until


class SpareThreads:
    """OpenMP threads that do nothing, so many that there are more than cores. Held until `release`."""

    def __init__(self, library: ctypes.CDLL, count: int):
        held, self._end = threading.Event(), threading.Event()

        def hold() -> None:
            # The team outlives its one operation, which is a call of getpid on every thread.
            library.GOMP_parallel(ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p), None, count + 1, 0)
            held.set()
            self._end.wait()

        self._thread = threading.Thread(target=hold, daemon=True)
        self._thread.start()
        held.wait()

    def release(self) -> None:
        """End the threads."""
        self._end.set()
        self._thread.join()


def spare_threads() -> SpareThreads | None:
    """As many threads as it takes; None where torch has not been imported, has one thread, or waits in another way."""
    library = _libgomp()
    if library is None:
        return None
    # Another thread may be in the middle of importing torch: then the next look finds it whole.
    counted = getattr(sys.modules["torch"], "get_num_threads", None)
    if counted is None:
        return None
    threads, cores = counted(), len(os.sched_getaffinity(0))
    return SpareThreads(library, cores + 1 - threads) if 1 < threads <= cores else None


def _libgomp() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded, where that is GNU's."""
    torch = sys.modules.get("torch")
    folder = Path(getattr(torch, "__file__", None) or "nowhere").parent / "lib"
    for path in sorted(folder.glob("libgomp*.so*")):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


def waited_s() -> float:
    """Seconds that the threads of this process have been ready to run and had no core."""
    waited = 0
    for task in Path("/proc/self/task").iterdir():
        # A thread may end while it is looked at.
        with suppress(OSError, ValueError, IndexError):
            waited += int((task / "schedstat").read_text().split()[1])
    return waited / 1e9


def _readable() -> bool:
    """Whether the kernel reports how long threads wait: Linux does, unless it was built without."""
    return sys.platform == "linux" and Path("/proc/self/schedstat").exists()
