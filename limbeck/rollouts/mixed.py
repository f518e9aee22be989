"""Steps on the student's responses mixed with steps on responses written before training (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.rollouts.sources import (
    MAX_PREVIEW_STEPS,
    OfflineSource,
    StatelessSource,
    StepCounter,
    die,
    first_steps,
    known_step_of,
)
from limbeck.rollouts.student import StudentSource
from limbeck.types import LimbeckError, Response


@dataclass(frozen=True, kw_only=True)
class SharePath:
    """The share of the student's steps from the start of a training to its end.

    Attributes:
        shape: "linear", or "exponential": the share of the fixed responses falls by one factor from step to step, as in
            ImitKD (arXiv 2009.07253, r^i).
    """

    start: float
    end: float
    shape: Literal["linear", "exponential"] = "linear"

    def __post_init__(self) -> None:
        for value in (self.start, self.end):
            if not 0 <= value <= 1:
                raise LimbeckError(f"share is {value}: expected a probability from 0 (fixed) to 1 (the student's own)")

    def at(self, fraction: float) -> float:
        """The share after this fraction of the training."""
        if self.shape == "linear":
            return self.start + (self.end - self.start) * fraction
        return 1 - (1 - self.start) ** (1 - fraction) * (1 - self.end) ** fraction


class MixedSource(StatelessSource):
    """Each step trains on the student's responses with probability lambda, else on fixed ones; all ranks alike.

    ImitKD's lambda grows over training (its authors throw the die for each response, not for each step). Other papers
    call the student's responses alone, through a buffer, ImitKD.
    """

    def __init__(self, own: StudentSource, base: OfflineSource, *, share: SharePath, seed: int):
        self.own, self.base, self.share, self.seed = own, base, share, seed

    @property
    def prompts(self) -> frozenset[str]:
        return self.own.prompts | self.base.prompts

    @property
    def steps_per_epoch(self) -> int:
        return self.base.steps_per_epoch

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        if self.own.refresh > 1:
            # Its first round may be written later than at the first step.
            return self.base.preview(count, total)
        return first_steps(self, min(count, MAX_PREVIEW_STEPS), total)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        return self._chosen(clock).step(clock)

    def known_step(self, clock: StepCounter) -> dict[int, Response] | None:
        return known_step_of(self._chosen(clock), clock)

    def _chosen(self, clock: StepCounter) -> StudentSource | OfflineSource:
        return self.own if self._is_own(clock) else self.base

    def _is_own(self, clock: StepCounter) -> bool:
        return die(self.seed, clock.step).random() < self._share(clock)

    def _share(self, clock: StepCounter) -> float:
        return self.share.at(clock.schedule_fraction)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.own.restore({})

    def starts_round(self, clock: StepCounter) -> bool:
        return self.own.starts_round(clock)

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        # A resumed run may have read no round of the student's before a step on the others.
        return {"share": self._share(clock)} | (self.own.metrics(clock) if self._is_own(clock) else {})
