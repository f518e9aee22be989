"""Separation of arms: differences tested together, and the letters of groups that are not separated.

A pair is separated where the interval of its difference excludes 0. Among k arms there are k (k - 1) / 2 differences;
each is tested at a level of its own such that the chance of any wrong separation stays at 5 % (Holm 1979, "A simple
sequentially rejective multiple test procedure"). That holds however the differences depend on each other. Resampled
maxima (max-T) do not hold with few seeds: all differences then move with the same two or three numbers, and their
maximum comes out too small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from limbeck.compare.student_t import MANY, quantile, tail
from limbeck.evaluation.scores.bootstrap import CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two arms, before it is tested.

    Attributes:
        variance: of the difference over resamples, both sources together.
        unit: what the pair says of the variance of one run by training; None where both arms have one seed.
        own: the part of `variance` that comes from training.
        share: what a unit of training variance adds to the variance of this difference.
        freedom: degrees of freedom of `variance`.
    """

    difference: float
    variance: float
    unit: float | None
    own: float
    share: float
    dof: float = MANY

    def with_pooled_variance(self, pooled: float, dof: float) -> Difference:
        """With the training variance of all arms together where the pair's own, from its few seeds, is smaller.

        One pair of many always has seeds that agree by chance; on its own it would look far surer than it is.
        """
        training = max(self.own, pooled * self.share)
        variance = self.variance - min(self.own, self.variance) + training
        return replace(self, variance=variance, own=training, dof=satterthwaite(training, dof, variance))


@dataclass(frozen=True, kw_only=True)
class ComparedPair:
    """First minus second.

    Attributes:
        error: standard error of the difference.
        freedom: degrees of freedom of that error.
        level: the chance of a false alarm that this comparison was given (Holm); its interval is the one at that level.
    """

    difference: float
    error: float
    dof: float
    level: float
    separated: bool

    @property
    def half_width(self) -> float:
        """Half the width of the interval, which excludes 0 exactly where the two are separated."""
        return quantile(self.level, self.dof) * self.error


def holm(found: Mapping[tuple[int, int], Difference]) -> dict[tuple[int, int], ComparedPair]:
    """Test the pairs from the surest on, each at the level that is left, until one is not separated."""

    def chance(gap: Difference) -> float:
        error = math.sqrt(gap.variance)
        if error <= 1e-12 * abs(gap.difference):
            return 0.0 if gap.difference else 1.0
        return tail(gap.difference / error, gap.dof)

    chances = {pair: chance(gap) for pair, gap in found.items()}
    made, going = {}, True
    level = (1 - CONFIDENCE) / max(1, len(found))
    for done, pair in enumerate(sorted(found, key=chances.__getitem__)):
        level = (1 - CONFIDENCE) / (len(found) - done) if going else level
        going = going and chances[pair] < level
        gap = found[pair]
        made[pair] = ComparedPair(
            difference=gap.difference, error=math.sqrt(gap.variance), dof=gap.dof, level=level, separated=going
        )
    return made


def satterthwaite(part: float, dof: float, whole: float) -> float:
    """Satterthwaite's degrees of freedom of a variance of which one part is uncertain; the rest counts as known."""
    return min(MANY, max(dof, dof * (whole / part) ** 2)) if part > 0 and whole > 0 else MANY


def letters(order: Sequence[int], pairs: Mapping[tuple[int, int], ComparedPair]) -> dict[int, str]:
    """Letters of each arm: two arms share one exactly when they are not separated (Piepho 2004, insert and absorb).

    Args:
        order: arms from best to worst; the best group is "a".
    """
    groups = [set(order)]
    for (first, second), pair in pairs.items():
        if pair.separated and {first, second} <= set(order):
            torn = [group for group in groups if {first, second} <= group]
            groups = [group for group in groups if group not in torn]
            for part in [group - {one} for group in torn for one in (first, second)]:
                groups = [group for group in groups if not group <= part]
                if not any(part <= group for group in groups):
                    groups.append(part)
    place = {arm: n for n, arm in enumerate(order)}
    groups.sort(key=lambda group: sorted(place[arm] for arm in group))
    return {arm: "".join(_letter(n) for n, group in enumerate(groups) if arm in group) for arm in order}


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26) + ("" if number < 26 else str(number // 26))
