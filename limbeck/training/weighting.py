"""Weights of the tokens of a step: the only place where per-token values become a mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from limbeck.objectives.sequence.distillm2 import Beta
from limbeck.rollouts.sources import StepCounter
from limbeck.types import Response


@dataclass(frozen=True, kw_only=True)
class TokenWeighting:
    """Weights that add up to a mean over the whole step, over all ranks and accumulation steps.

    Attributes:
        reduction: "token" is a mean over tokens, "sequence" over the tokens of each response and then over responses.
        beta: with it the loss is ``scale * ((1 - beta) * mean of the teacher's + beta * mean of the student's)``
            (DistiLLM-2, arXiv 2503.07067, eq. 2); None is one mean over all responses.
        scale: 2 gives the sum of the two means at beta = 0.5, which the released code of DistiLLM-2 has.
    """

    reduction: Literal["token", "sequence"] = "token"
    beta: Beta | None = None
    scale: float = 2.0

    def beta_at(self, clock: StepCounter, steps_per_epoch: int) -> float | None:
        """The student's share at a step; None where all responses are treated alike."""
        return None if self.beta is None else self.beta.at(clock.step, clock.total, steps_per_epoch)

    def weights(self, by_row: Mapping[int, Response], clock: StepCounter, steps_per_epoch: int) -> dict[int, float]:
        """The weight of each token of a response, by its number."""
        beta = self.beta_at(clock, steps_per_epoch)
        sides: dict[bool, list[int]] = {}
        for row, response in by_row.items():
            sides.setdefault(response.author == "student" if beta is not None else False, []).append(row)
        weights: dict[int, float] = {}
        for own, rows in sides.items():
            factor = 1.0 if beta is None else self.scale * (beta if own else 1 - beta)
            lengths = {row: by_row[row].tokens for row in rows}
            if self.reduction == "token":
                weights |= dict.fromkeys(rows, factor / sum(lengths.values()))
            else:
                weights |= {row: factor / (len(rows) * length) for row, length in lengths.items()}
        return {row: weights[row] for row in by_row}
