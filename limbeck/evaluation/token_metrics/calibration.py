"""Calibration: whether tokens that a model is sure of to 80 % come true in 80 % of the cases (Guo et al. 2017).

Confidences fall into 15 bins of equal width, (0, 1/15] to (14/15, 1]. The expected calibration error is the mean of the
bins' distances between confidence and outcome, weighted by their tokens (their equation 3); it is a metric of all
tokens together (`limbeck.evaluation.scores.pooled`), and what is kept of an example is its sums in every bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.types import Json

BINS = 15


def bin_sums(confidence_N: Tensor, outcome_N: Tensor, example_N: Tensor, examples: int) -> Tensor:
    """Tokens, sum of confidences and sum of outcomes of each example in each bin, (examples, 3, BINS) float64.

    Args:
        confidence_N: probability of the token that is predicted, in [0, 1].
        outcome_N: whether it came true, or the probability with which it does.
        example_N: number of the example that each token belongs to, int64.
    """
    confidence_N, outcome_N = confidence_N.double(), outcome_N.double()
    edges = torch.arange(1, BINS, dtype=torch.float64, device=confidence_N.device) / BINS
    place_N = example_N * BINS + torch.bucketize(confidence_N, edges)
    columns = (torch.ones_like(confidence_N), confidence_N, outcome_N)
    sums = [torch.bincount(place_N, weights=column, minlength=examples * BINS) for column in columns]
    return torch.stack([column.view(examples, BINS) for column in sums], dim=1)


def pooled_parts(sums_3B: Tensor) -> tuple[float, ...]:
    """What `limbeck.evaluation.scores.pooled.calibration_error` adds up: the gap in every bin, then the tokens."""
    tokens_B, confidence_B, outcome_B = sums_3B
    return (*(outcome_B - confidence_B).tolist(), float(tokens_B.sum()))


def curve(sums_3B: Tensor) -> list[Json]:
    """The reliability curve: mean confidence and mean outcome of every bin that holds tokens."""
    points: list[Json] = []
    for number, (tokens, confidence, outcome) in enumerate(sums_3B.T.tolist()):
        if tokens:
            edges = {"above": number / BINS, "up_to": (number + 1) / BINS}
            points.append(
                edges | {"tokens": int(tokens), "confidence": confidence / tokens, "outcome": outcome / tokens}
            )
    return points
