"""Windows of steps: the training's steps in groups whose teacher signals are on disk at the same time.

    steps      0 1 2 3 4 | 5 6 7 8 | 9 10 11 12 13 | ...      each group is one window
    on disk    the signals of the window that training is in, and of no other

Where a window ends follows from the order of the responses and the bytes of each alone, so that a training that goes on
after a kill finds itself in the same window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from limbeck.rollouts.order import Plan
from limbeck.rollouts.sources import OfflineSource, StatelessSource, StepCounter, known_step_of
from limbeck.types import LimbeckError, Response


@dataclass(frozen=True, kw_only=True)
class Window:
    """A group of steps.

    Attributes:
        number: its place among all.
        first, last: its steps.
        source: has their responses.
    """

    number: int
    first: int
    last: int
    source: OfflineSource

    def responses(self) -> list[Response]:
        """The responses of its steps, each once."""
        rows = {row for step in range(self.first, self.last + 1) for row in self.source.plan.at(step)}
        return [self.source.trained[row] for row in sorted(rows)]


# Called with the window that begins, and the one after it, where there is one.
OpenWindow = Callable[[Window, Window | None], None]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of a training.

    Attributes:
        bytes_of: what the signal of each row takes.
        limit: bytes of a window at most.
    """

    plan: Plan
    bytes_of: np.ndarray
    limit: int

    def of(self, total: int) -> list[int]:
        """The first step of each window of a training of so many steps, and its end.

        Raises:
            LimbeckError: one step takes more than the limit.
        """
        firsts, size, rows = [0], 0, set[int]()
        for step in range(total):
            new = set(self.plan.at(step)) - rows
            more = self._bytes(new)
            if size + more > self.limit and rows:
                firsts.append(step)
                new = set(self.plan.at(step))
                size, rows, more = 0, set(), self._bytes(new)
            if more > self.limit:
                raise LimbeckError(
                    f"teacher.cache_limit_gib leaves the steps of a window {self.limit / 2**30:.3g} GiB, but the "
                    f"signal of step {step + 1} alone takes {more / 2**30:.3g} GiB; raise it, or set "
                    "teacher.support=topk_tail"
                )
            size, rows = size + more, rows | new
        return [*firsts, total]

    def _bytes(self, rows: set[int]) -> int:
        return int(self.bytes_of[list(rows)].sum())


class WindowedSource(StatelessSource):
    """Responses written before training, whose teacher signals are computed window by window.

    Args:
        open_window: computes the signals of a window; called on all ranks, before the first step in it or, of a
            training that goes on, in it.
        bytes_of: what the signal of each response takes.
        limit: bytes of a window at most.
    """

    def __init__(self, source: OfflineSource, open_window: OpenWindow, *, bytes_of: np.ndarray, limit: int):
        self.source = source
        self._open_window = open_window
        self._windows = Windows(plan=source.plan, bytes_of=bytes_of, limit=limit)
        self._firsts: list[int] = []
        self._open: int | None = None

    @property
    def prompts(self) -> frozenset[str]:
        return self.source.prompts

    @property
    def steps_per_epoch(self) -> int:
        return self.source.steps_per_epoch

    def step(self, clock: StepCounter) -> dict[int, Response]:
        if not self._firsts or self._firsts[-1] != clock.total:
            self._firsts = self._windows.of(clock.total)
        bounds = list(pairwise(self._firsts))
        number = next(i for i, (_, end) in enumerate(bounds) if clock.step < end)
        if number != self._open:
            here, *later = (
                Window(number=i, first=first, last=end - 1, source=self.source)
                for i, (first, end) in enumerate(bounds[number : number + 2], start=number)
            )
            self._open_window(here, later[0] if later else None)
            self._open = number
        return self.source.step(clock)

    def known_step(self, clock: StepCounter) -> dict[int, Response] | None:
        """The responses of a step in the window that is open: the signals of no other are sure to be there."""
        opened = self._open is not None and clock.step < self._firsts[self._open + 1]
        return known_step_of(self.source, clock) if opened else None

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        """The same as of the source: no window is opened for it."""
        return self.source.preview(count, total)
