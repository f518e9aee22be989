"""Stop signals: the first one is remembered while a step is finished, the second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

# Ctrl-C, a terminal that closes, and what schedulers send before they kill (SIGTERM; SLURM's --signal=USR1).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class GracefulStop:
    """A request to stop, made by a signal. While `deferred`, the first one is only noted, so that a step can finish."""

    number: int = 0
    _depth: int = 0

    @property
    def requested(self) -> bool:
        return self.number != 0

    @contextmanager
    def deferred(self) -> Iterator[Callable[[], bool]]:
        """Yield a function that says whether a stop was requested; the block then ends by itself at a good place."""
        self._depth += 1
        try:
            yield lambda: self.requested
        finally:
            self._depth -= 1

    def raise_if_requested(self) -> None:
        """End the process by an exception where a stop was requested.

        Raises:
            KeyboardInterrupt: with the signal's number.
        """
        if self.requested:
            raise KeyboardInterrupt(self.number)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block; only possible in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A signal that is ignored stays so: `nohup` ignores a closing terminal.
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        del frame
        again, self.number = self.requested, number
        if again or not self._depth:
            raise KeyboardInterrupt(number)
        # The terminal may have been closed.
        with suppress(OSError):
            print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
