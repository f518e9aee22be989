"""The order of responses over optimizer steps: a pure function of lengths, seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from limbeck.types import Response

# Steps of similar length are formed inside windows of this many optimizer steps: long enough that lengths match,
# short enough that the order stays random.
WINDOW_STEPS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The order of the data over a whole run.

    Attributes:
        lengths: tokens of each response with its prompt, which padding depends on.
        step_rows: responses of one optimizer step, over all ranks and accumulation steps.
    """

    lengths: Sequence[int] | np.ndarray
    step_rows: int
    seed: int

    @classmethod
    def of(cls, responses: Sequence[Response], *, step_rows: int, seed: int) -> Plan:
        # Arrow takes a while to import, and recipes are read without it.
        from limbeck.rollouts.table import lengths_of

        return cls(lengths=lengths_of(responses), step_rows=step_rows, seed=seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.step_rows)

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The optimizer steps of an epoch, each a tuple of row numbers sorted by length, longest first."""
        return [self._step(epoch, index) for index in range(self.steps_per_epoch)]

    def at(self, step: int) -> tuple[int, ...]:
        """The rows of an optimizer step, counted from the start of the training."""
        return self._step(*divmod(step, self.steps_per_epoch))

    def _step(self, epoch: int, index: int) -> tuple[int, ...]:
        rows, turns = _epoch(self, epoch)
        start = int(turns[index]) * self.step_rows
        return tuple(rows[start : start + self.step_rows].tolist())


# Rows are numbers of four bytes and not Python's: of a million responses an epoch takes 4 MB.
@lru_cache(maxsize=4)
def _epoch(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of an epoch, step by step in the order they are formed, and which of these steps comes when."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    lengths = np.asarray(plan.lengths)
    rows = torch.randperm(len(lengths), generator=generator).to(torch.int32).numpy()
    window = WINDOW_STEPS * plan.step_rows
    for start in range(0, len(rows), window):
        block = rows[start : start + window]
        # A stable sort of a random order: equal lengths still meet in random company. Steps are full but for the last
        # one of the last window, which has its shortest rows.
        rows[start : start + window] = block[np.argsort(-lengths[block], kind="stable")]
    turns = torch.randperm(plan.steps_per_epoch, generator=generator).to(torch.int32).numpy()
    return rows, turns
