"""Metrics over many examples with bootstrap intervals: a resample draws whole examples, never tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from limbeck.evaluation.scores.metrics import known_metrics
from limbeck.evaluation.scores.pooled import LIFTED, POOLED
from limbeck.types import LimbeckError, Score, ScoredRow

if TYPE_CHECKING:
    from numpy import ndarray

CONFIDENCE = 0.95
RESAMPLES = 2000
# Numbers of draws in memory: 64 MB.
AT_A_TIME = 8 << 20


def summarise(rows: Sequence[ScoredRow], *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Score]:
    """Every metric over all rows with its 95 % bootstrap interval over rows.

    A mean is ``sum_i weight_i value_i / sum_i weight_i``, in float64; a metric of the corpus is made of the rows' sums,
    and left out where what they are divided by is 0. A resample draws whole examples, since the tokens of one answer
    are far from independent (Efron and Tibshirani 1993, chapter 13).

    Raises:
        LimbeckError: no rows, rows that measure different things, repeated ids, or values that are not finite.
    """
    import numpy as np

    table = Table.of(rows)
    drawn_SM = np.concatenate([table.over(counts_SR) for counts_SR in _resample(len(rows), seed, resamples)])
    return _scores(table, table.over(_once(rows))[0], drawn_SM, len(rows), least=0.0)


def paired_change(
    before: Sequence[ScoredRow], after: Sequence[ScoredRow], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Score]:
    """After minus before, where every resample draws the same examples for both.

    Raises:
        LimbeckError: the two did not measure the same examples and metrics, or `summarise` would refuse one of them.
    """
    import numpy as np

    by_id = {row.id: row for row in after}
    if [row.id for row in before] != [row.id for row in after]:
        if {row.id for row in before} != set(by_id) or len(by_id) != len(after):
            raise LimbeckError(
                f"before holds {len(before)} examples and after {len(after)}, not all the same ones; "
                "expected one row per example in both: evaluate both students on the same held-out examples"
            )
        after = [by_id[row.id] for row in before]
    first, second = Table.of(before), Table.of(after)
    if first.names != second.names:
        raise LimbeckError(
            f"before measured {', '.join(first.names)} and after {', '.join(second.names)}; expected the same metrics: "
            "evaluate both again"
        )
    once_1R = _once(before)
    point_M = (second.over(once_1R) - first.over(once_1R))[0]
    draws = _resample(len(before), seed, resamples)
    drawn_SM = np.concatenate([second.over(counts_SR) - first.over(counts_SR) for counts_SR in draws])
    return _scores(first, point_M, drawn_SM, len(before), least=-math.inf)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows as arrays: R examples, M metrics that are means.

    Attributes:
        names: the means, then the metrics of the whole corpus.
        sums: parts of each metric of the corpus, (R, its parts).
    """

    names: tuple[str, ...]
    weight_R: ndarray
    value_RM: ndarray
    sums: dict[str, ndarray]

    @classmethod
    def of(cls, rows: Sequence[ScoredRow]) -> Table:
        import numpy as np

        if not rows:
            raise LimbeckError("got no examples to score; expected at least one: raise prompts.eval_fraction")
        names, pooled = list(rows[0].values), list(rows[0].sums)
        described = known_metrics()
        if unknown := [name for name in names + pooled if name not in described]:
            raise LimbeckError(
                f"the metric {unknown[0]!r} is not described; expected its unit, direction and meaning in `metrics` of "
                "the evaluation group that measures it"
            )
        seen = set()
        for row in rows:
            if row.id in seen:
                raise LimbeckError(f"got example {row.id!r} twice; expected one row per example: merge its rows first")
            seen.add(row.id)
            _check(row, rows[0])
        return cls(
            names=(*names, *pooled),
            weight_R=np.array([row.weight for row in rows], dtype=np.float64),
            value_RM=np.array([[row.values[name] for name in names] for row in rows], dtype=np.float64),
            sums={name: np.array([row.sums[name] for row in rows], dtype=np.float64) for name in pooled},
        )

    def over(self, counts_SR: ndarray) -> ndarray:
        """Every metric where example r counts counts_SR[s, r] times, (S, metrics)."""
        import numpy as np

        means_SM = (counts_SR @ (self.weight_R[:, None] * self.value_RM)) / (counts_SR @ self.weight_R)[:, None]
        pooled = [POOLED[name](counts_SR @ parts_RK) for name, parts_RK in self.sums.items()]
        return np.concatenate([means_SM, *(value_S[:, None] for value_S in pooled)], axis=1)


def _check(row: ScoredRow, first: ScoredRow) -> None:
    if set(row.values) != set(first.values) or set(row.sums) != set(first.sums):
        raise LimbeckError(
            f"example {row.id!r} measures {', '.join((*row.values, *row.sums))}; expected "
            f"{', '.join((*first.values, *first.sums))} as the first row: evaluate again"
        )
    measured = list(row.values.items())
    measured += [(name, part) for name, parts in row.sums.items() for part in parts]
    for name, value in measured:
        if not math.isfinite(value):
            raise LimbeckError(
                f"{name} of example {row.id!r} is {value}; expected a finite number: "
                "look for NaN or inf in the weights of the student and the teacher"
            )
    if not (math.isfinite(row.weight) and row.weight > 0):
        raise LimbeckError(f"example {row.id!r} has weight {row.weight}; expected more than 0: drop empty examples")


def _resample(examples: int, seed: int, resamples: int) -> Iterator[ndarray]:
    """Number of draws of each example, (some of the resamples, examples) float64; the same for every metric and both
    sides."""
    if examples * resamples <= AT_A_TIME:
        yield _few(examples, seed, resamples)
    else:
        yield from _in_pieces(examples, seed, resamples)


def _in_pieces(examples: int, seed: int, resamples: int) -> Iterator[ndarray]:
    import numpy as np

    rng, share_R = np.random.Generator(np.random.PCG64(seed)), np.full(examples, 1.0 / examples)
    step = max(1, AT_A_TIME // examples)
    for start in range(0, resamples, step):
        yield rng.multinomial(examples, share_R, size=min(step, resamples - start)).astype(np.float64)


@lru_cache(maxsize=1)
def _few(examples: int, seed: int, resamples: int) -> ndarray:
    """All of them at once, which the tables of an evaluation share."""
    (whole,) = _in_pieces(examples, seed, resamples)
    return whole


def _once(rows: Sequence[ScoredRow]) -> ndarray:
    """Every example as it is."""
    import numpy as np

    return np.ones((1, len(rows)))


def _scores(table: Table, point_M: ndarray, drawn_SM: ndarray, examples: int, *, least: float) -> dict[str, Score]:
    """Points with their intervals.

    Intervals are between percentiles of the resamples, without those that have no value. A calibration error adds up
    absolute values, so that chance lifts it, and resamples lift it once more: the percentiles lie too high, and of a
    well calibrated model they miss the truth always. Its interval is pivotal: the resamples are mirrored at the point,
    so that the lift comes off. It is widened to hold the point and ends at `least`.
    """
    import numpy as np

    tail = 50 * (1 - CONFIDENCE)
    found: dict[str, Score] = {}
    for name, point, drawn_S in zip(table.names, point_M.tolist(), drawn_SM.T, strict=True):
        if not math.isfinite(point):
            continue
        low, high = np.percentile(drawn_S[np.isfinite(drawn_S)], [tail, 100 - tail]).tolist()
        if name in LIFTED:
            low, high = max(min(2 * point - high, point), least), max(2 * point - low, point)
        alone = examples < 2
        found[name] = Score(mean=point, low=None if alone else low, high=None if alone else high, n=examples)
    return found
