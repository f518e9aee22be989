"""Ranking of values and arms by a metric of the evaluation, in the direction that METRICS gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.evaluation.scores.metrics import describe_metric
from limbeck.types import LimbeckError

Means = Mapping[str, float]


def badness(metric: str, means: Means) -> float:
    """Distance of a student from the best; smaller is better.

    A metric that is best where it equals the teacher's counts by its distance from that.

    Raises:
        LimbeckError: the metric, or the teacher's value of it, was not measured.
    """
    described = describe_metric(metric)
    for name in (metric, described.teacher if described.better == "match" else None):
        if name is not None and name not in means:
            raise LimbeckError(
                f"{name} was not measured (but {', '.join(sorted(means)) or 'nothing'}); name one of these, or add the "
                "group that measures it to evaluate.groups"
            )
    if described.better == "match":
        target = described.teacher_value if described.teacher is None else means[described.teacher]
        assert target is not None, "METRICS says what is to be matched"
        return abs(means[metric] - target)
    return means[metric] if described.better == "lower" else -means[metric]


def best(badnesses: Sequence[float]) -> int:
    """Number of the best; of equals the first, so that the choice never depends on what finished when."""
    return min(range(len(badnesses)), key=lambda i: (badnesses[i], i))


def beyond(tried: Sequence[Any], chosen: Any) -> float | None:
    """The next value past the end of the values tried, by the ratio of the last two; None where the choice is no end,
    or the values are no positive numbers. Of whole numbers it is one."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in tried):
        return None
    ordered = sorted(set(tried))
    if len(ordered) < 2 or chosen not in (ordered[0], ordered[-1]):
        return None
    end, inner = (ordered[0], ordered[1]) if chosen == ordered[0] else (ordered[-1], ordered[-2])
    if all(isinstance(v, int) for v in tried):
        whole = round(end * end / inner)
        return None if whole in (0, end) else whole
    # Three digits, so that a rate reads 0.0009 and not 0.0009000000000000001.
    return float(f"{end * end / inner:.3g}")


def survivors(badnesses: Mapping[str, float], keep: float) -> list[str]:
    """The arms that go on: the best share, rounded up, in their own order; of equals the earlier (Jamieson and
    Talwalkar 2016, successive halving)."""
    order = {name: number for number, name in enumerate(badnesses)}
    ranked = sorted(badnesses, key=lambda name: (badnesses[name], order[name]))
    # 0.3 of 10 arms are 3, though a little less than that in binary.
    return sorted(ranked[: math.ceil(round(keep * len(ranked), 6))], key=order.__getitem__)
