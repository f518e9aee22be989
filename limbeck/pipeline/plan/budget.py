"""The time that a probe may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from limbeck.models.heads import decoder_blocks

Now = Callable[[], float]


class TimeIsUp(Exception):
    """The time of a piece of a probe is used up."""


@dataclass
class Budget:
    """Seconds of a probe, shared out over its pieces as they come.

    Attributes:
        shares: of the pieces that are still to come.
        spent: seconds of timed work so far.
        loading: seconds that loading and first passes took, which do not count.
        until: when the piece that runs must end; None outside of pieces.
    """

    seconds: float
    shares: list[float]
    clock: Now = time.perf_counter
    spent: float = 0.0
    loading: float = 0.0
    until: float | None = field(default=None, init=False)

    @property
    def left(self) -> float:
        """Seconds of the piece that runs."""
        assert self.until is not None, "asked inside of a piece"
        return self.until - self.clock()

    @contextmanager
    def piece(self) -> Iterator[None]:
        """One piece: it has its share of what is left, and what it does not use goes to the others."""
        began = self.clock()
        allowed = (self.seconds - self.spent) * self.shares[0] / sum(self.shares)
        self.shares.pop(0)
        self.until = began + allowed
        try:
            yield
        except TimeIsUp:
            pass
        finally:
            self.until = None
            self.spent += self.clock() - began

    @contextmanager
    def load(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        """Work before the pieces, whose time is kept by name."""
        began = self.clock()
        yield
        seconds[name] = seconds.get(name, 0.0) + self.clock() - began
        self.loading += self.clock() - began

    def check(self, needed: float = 0.0) -> None:
        """End the piece that runs where its time is up, or will be before something that is known to take so long.

        Raises:
            TimeIsUp: it is.
        """
        if self.left <= needed:
            raise TimeIsUp

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """End the piece inside of a pass through a model, before any of its blocks, once its time is up."""

        def look(*_: object) -> None:
            if self.until is not None:
                self.check()

        handles = [block.register_forward_pre_hook(look) for block in decoder_blocks(model)[1]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
