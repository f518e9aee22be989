"""Metrics of a whole corpus that are no mean over its examples: each is made of sums that the examples add up to.

A row keeps its part of the sums (`ScoredRow.sums`), so that any resample of examples has its own value. A new one is an
entry here, one in METRICS, and its parts in the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray


def calibration_error(sums_SK: ndarray) -> ndarray:
    """Expected calibration error, (S,): the bins' gaps by their size over all tokens (Guo et al. 2017, equation 3).

    Args:
        sums_SK: sum of outcome - confidence in each bin, then the number of tokens.
    """
    return abs(sums_SK[..., :-1]).sum(-1) / sums_SK[..., -1]


def ratio(sums_S2: ndarray) -> ndarray:
    """One sum over another, (S,); NaN or infinite where that other is 0."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return sums_S2[..., 0] / sums_S2[..., 1]


def perplexity(sums_S2: ndarray) -> ndarray:
    """exp of one sum over another: nats over tokens, (S,)."""
    import numpy as np

    return np.exp(ratio(sums_S2))


def speedup(sums_S4: ndarray) -> ndarray:
    """Seconds per token before over seconds per token after, (S,).

    Args:
        sums_S4: seconds and tokens before, seconds and tokens after.
    """
    return ratio(sums_S4[..., :2]) / ratio(sums_S4[..., 2:])


def _expected_speedup(sums_S5: ndarray) -> ndarray:
    """Tokens per pass that an acceptance promises, over what a round costs, (S,).

    Args:
        sums_S5: drafts that stand, drafts that were looked at; then, per prompt 1, the drafts of a round, and the
            cost of a round in steps of the teacher alone.
    """
    import numpy as np

    acceptance_S = ratio(sums_S5[..., :2])
    drafted, cost = (sums_S5[..., place].sum() / sums_S5[..., 2].sum() for place in (3, 4))
    return (acceptance_S[..., None] ** np.arange(round(drafted) + 1)).sum(-1) / cost


# Those that chance lifts, since they add up absolute values: resamples lift them once more.
LIFTED = frozenset({"student_ece", "teacher_ece", "ece_to_teacher"})

POOLED: dict[str, Callable[[ndarray], ndarray]] = {
    "student_ece": calibration_error,
    "teacher_ece": calibration_error,
    "ece_to_teacher": calibration_error,
    "draft_acceptance": ratio,
    "tokens_per_pass": ratio,
    "perplexity": perplexity,
    "teacher_perplexity": perplexity,
    "bits_per_byte": ratio,
    "teacher_bits_per_byte": ratio,
    "recovered": ratio,
    "gap_recovered": ratio,
    "speculative_speedup": speedup,
    "expected_speedup": _expected_speedup,
}
