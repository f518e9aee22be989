"""Trials of the search for the learning rate: short trainings at one rate, each undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from limbeck.training.learning_rate import TRIAL_STEPS, trial_factors
from limbeck.types import Response

# Responses that the trials are measured on: some hundred tokens at least, so that differences of a percent show.
MEASURED_RESPONSES = 16

Step = Mapping[int, Response]


@dataclass(frozen=True, kw_only=True)
class RateTrials:
    """Trials over the first steps of a training.

    Attributes:
        put_back: gives the student the weights that it began with.
        steps: responses of the steps of a trial, begun anew when they are used up.
        measured: responses of the steps that a trial is measured on.
        update: makes one update with the gradients of a step at a rate, and says whether they were finite.
        loss_on: mean loss per token on the responses of some steps, without gradients.
    """

    put_back: Callable[[], None]
    optimizer: torch.optim.Optimizer
    steps: Sequence[Step]
    measured: Sequence[Step]
    update: Callable[[int, Step, float], bool]
    loss_on: Callable[[Sequence[Step]], float]

    @classmethod
    def of(
        cls,
        previews: Sequence[Step],
        *,
        put_back: Callable[[], None],
        optimizer: torch.optim.Optimizer,
        update: Callable[[int, Step, float], bool],
        loss_on: Callable[[Sequence[Step]], float],
    ) -> RateTrials:
        """The last of the previewed steps are measured, the others trained on; a single one is both."""
        last = min(_steps_to_measure(previews), max(1, len(previews) // 3))
        return cls(
            put_back=put_back,
            optimizer=optimizer,
            steps=previews[:-last] or previews,
            measured=previews[-last:],
            update=update,
            loss_on=loss_on,
        )

    def before(self) -> float:
        """The loss of the student as it begins."""
        return self.loss_on(self.measured)

    def try_rate(self, rate: float) -> float:
        """The loss after a trial; infinite where it left the finite numbers."""
        try:
            for i, factor in enumerate(trial_factors()):
                if not self.update(i, self.steps[i % len(self.steps)], rate * factor):
                    return math.inf
            loss = self.loss_on(self.measured)
            return loss if math.isfinite(loss) else math.inf
        finally:
            # Before the weights are read, which would lie beside them.
            self.optimizer.zero_grad()
            self.optimizer.state.clear()
            self.put_back()


def previews_wanted(step_rows: int) -> int:
    """Steps to look at for a trial and its measurement."""
    return TRIAL_STEPS + max(2, math.ceil(MEASURED_RESPONSES / step_rows))


def _steps_to_measure(previews: Sequence[Step]) -> int:
    return max(1, math.ceil(MEASURED_RESPONSES / max(len(previews[0]), 1)))
