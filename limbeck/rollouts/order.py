"""The order of responses over optimizer steps: a pure function of lengths, seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from limbeck.types import Response

# Steps of similar length are formed inside windows of this many optimizer steps: long enough that lengths match,
# short enough that the order stays random.
WINDOW_STEPS = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of the data over a whole run.

    Attributes:
        lengths: tokens of each response with its prompt, which padding depends on.
        step_rows: responses of one optimizer step, over all ranks and accumulation steps.
    """

    lengths: tuple[int, ...]
    step_rows: int
    seed: int

    @classmethod
    def of(cls, responses: Sequence[Response], *, step_rows: int, seed: int) -> Plan:
        return cls(lengths=tuple(r.length for r in responses), step_rows=step_rows, seed=seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.step_rows)

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The optimizer steps of an epoch, each a tuple of row numbers sorted by length, longest first."""
        return _epoch(self, epoch)

    def at(self, step: int) -> tuple[int, ...]:
        """The rows of an optimizer step, counted from the start of the training."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[index]


@lru_cache(maxsize=8)
def _epoch(plan: Plan, epoch: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    order = torch.randperm(len(plan.lengths), generator=generator).tolist()
    window = WINDOW_STEPS * plan.step_rows
    steps: list[tuple[int, ...]] = []
    for start in range(0, len(order), window):
        # A stable sort of a random order: equal lengths still meet in random company.
        block = sorted(order[start : start + window], key=lambda row: -plan.lengths[row])
        # The window's remainder is its shortest rows; steps before it are full.
        steps += [tuple(block[i : i + plan.step_rows]) for i in range(0, len(block), plan.step_rows)]
    shuffled = torch.randperm(len(steps), generator=generator).tolist()
    return [steps[i] for i in shuffled]
