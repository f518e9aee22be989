"""Uncertainty of a comparison of arms: both the examples and the training seeds could have been others.

Runs and examples are crossed: every run answers the same examples, and a seed may be shared by all arms. So a resample
draws examples once for all runs and seeds once for all arms that have the same ones (Owen 2007, "The pigeonhole
bootstrap", Annals of Applied Statistics 1, 386-411; a little too wide where noise lies in single answers, never too
narrow). Two corrections keep few seeds honest. Drawing S
seeds from S makes their variance too small by (S - 1) / S, so deviations are stretched (Rao and Wu 1988, JASA 83,
231-241). And a variance from few seeds is itself uncertain: intervals use Student's t with the degrees of freedom of
Satterthwaite 1946 (Biometrics Bulletin 2, 110-114).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from limbeck.compare.pairwise import ComparedPair, Difference, holm, satterthwaite
from limbeck.compare.student_t import quantile
from limbeck.evaluation.scores.bootstrap import CONFIDENCE

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True, kw_only=True)
class ResampledMetric:
    """One metric of some runs on the same examples, and what it would have been on resampled ones.

    Attributes:
        arm_R: number of each run's arm; arms are numbered from 0 and each has a run.
        seed_R: each run's training seed; within an arm all differ.
        value_R: the metric of each run.
        drawn_BR: the same on resampled examples, the same draw for all runs.
        examples: how many there are.
        pivotal: whether resampling lifts the metric (a calibration error, see `evaluation.scores.bootstrap`): its
            interval is then mirrored at the value.
        share: whether it lies between 0 and 1, where its intervals end too.
    """

    arm_R: tuple[int, ...]
    seed_R: tuple[int, ...]
    value_R: ndarray
    drawn_BR: ndarray
    examples: int
    pivotal: bool = False
    share: bool = False

    @property
    def arms(self) -> int:
        return max(self.arm_R) + 1

    @cached_property
    def runs(self) -> list[dict[int, int]]:
        """Runs by seed, for each arm."""
        found: list[dict[int, int]] = [{} for _ in range(self.arms)]
        for run, (seed, arm) in enumerate(zip(self.seed_R, self.arm_R, strict=True)):
            found[arm][seed] = run
        return found


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An arm's mean over its runs.

    Attributes:
        low, high: 95 % interval; None where one example alone was measured. With one seed it knows nothing of training.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int


def draws(size: int, resamples: int, label: str) -> ndarray:
    """Number of draws of each of `size` things, (resamples, size) float64. The same label gives the same draws."""
    import numpy as np

    rng = np.random.Generator(np.random.PCG64(zlib.crc32(label.encode())))
    return rng.multinomial(size, np.full(size, 1.0 / size), size=resamples).astype(np.float64)


def arm_means(drawn_BR: ndarray, runs: Sequence[int], counts_BS: ndarray) -> ndarray:
    """Means of an arm with resampled seeds, (B,).

    Args:
        runs: the arm's runs in the order of its seeds.
        counts_BS: how often each of those seeds was drawn.
    """
    own_BS, seeds = drawn_BR[:, list(runs)], len(runs)
    middle_B = own_BS.mean(1)
    if seeds == 1:
        return middle_B
    drawn_B = (own_BS * counts_BS).sum(1) / seeds
    return middle_B + math.sqrt(seeds / (seeds - 1)) * (drawn_B - middle_B)


@dataclass(kw_only=True)
class Resampled:
    """A metric's resamples: every arm's mean and every pair's difference, on the same examples and shared seeds."""

    sheet: ResampledMetric
    _drawn: dict[tuple[int, tuple[int, ...]], ndarray] = field(default_factory=dict)
    _estimates: dict[int, Estimate] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether one example alone was measured, so that nothing can be said about spread."""
        return self.sheet.examples < 2

    def mean(self, arm: int) -> float:
        """The arm's mean over its runs."""
        return float(self._values(arm, tuple(self.sheet.runs[arm])).mean())

    def drawn(self, arm: int, seeds: tuple[int, ...] | None = None) -> ndarray:
        """The arm's resampled means, over all its seeds or some of them, (B,)."""
        seeds = tuple(sorted(seeds or self.sheet.runs[arm]))
        if (arm, seeds) not in self._drawn:
            runs = [self.sheet.runs[arm][seed] for seed in seeds]
            counts_BS = draws(len(seeds), len(self.sheet.drawn_BR), f"seeds {seeds}")
            self._drawn[arm, seeds] = arm_means(self.sheet.drawn_BR, runs, counts_BS)
        return self._drawn[arm, seeds]

    def estimate(self, arm: int) -> Estimate:
        """The arm's mean with its interval."""
        if arm not in self._estimates:
            self._estimates[arm] = self._estimate(arm)
        return self._estimates[arm]

    def _estimate(self, arm: int) -> Estimate:
        import numpy as np

        seeds, middle = len(self.sheet.runs[arm]), self.mean(arm)
        if self.alone:
            return Estimate(mean=middle, low=None, high=None, seeds=seeds)
        drawn_B = self.drawn(arm)
        if seeds > 1:
            dof = satterthwaite(self._seed_variance(arm), seeds - 1, float(drawn_B.var()))
            # Not the resamples' own percentiles: with three seeds they end at the outermost seed.
            half_width = quantile(1 - CONFIDENCE, dof) * float(drawn_B.std())
            low, high = middle - half_width, middle + half_width
            if self.sheet.share:
                low, high = max(0.0, low), min(1.0, high)
            return Estimate(mean=middle, low=low, high=high, seeds=seeds)
        tail = 50 * (1 - CONFIDENCE)
        low, high = (float(edge) for edge in np.percentile(drawn_B, [tail, 100 - tail]))
        if self.sheet.pivotal:
            low, high = min(2 * middle - high, middle), max(2 * middle - low, middle)
        if self.sheet.share:
            low, high = max(0.0, low), min(1.0, high)
        return Estimate(mean=middle, low=low, high=high, seeds=seeds)

    @cached_property
    def pairs(self) -> dict[tuple[int, int], ComparedPair]:
        """Every pair of arms, first number below second, tested together."""
        arms = self.sheet.arms
        if self.alone or arms < 2:
            return {}
        found = {}
        for first in range(arms):
            for second in range(first + 1, arms):
                found[first, second] = self._difference(first, second)
        repeated = [len(runs) - 1 for runs in self.sheet.runs if len(runs) > 1]
        if repeated:
            known = [gap.unit for gap in found.values() if gap.unit is not None]
            dof = sum(repeated) * max(1, len(repeated) - 1) / len(repeated)
            found = {
                pair: gap.with_pooled_variance(sum(known) / len(known), max(1.0, dof)) for pair, gap in found.items()
            }
        return holm(found)

    def _difference(self, first: int, second: int) -> Difference:
        """First minus second; paired over the seeds that both have."""
        ours, theirs = set(self.sheet.runs[first]), set(self.sheet.runs[second])
        shared = tuple(sorted(ours & theirs))
        if ours == theirs:
            cov_AA = self._covariance
            variance = float(cov_AA[first, first] + cov_AA[second, second] - 2 * cov_AA[first, second])
        elif len(shared) > 1:
            variance = float((self.drawn(first, shared) - self.drawn(second, shared)).var())
        else:
            variance = float((self.drawn(first) - self.drawn(second)).var())
            return self._unpaired(first, second, variance)
        apart_S, seeds = self._values(first, shared) - self._values(second, shared), len(shared)
        unit = float(apart_S.var(ddof=1)) / 2 if seeds > 1 else None
        return Difference(
            difference=float(apart_S.mean()),
            variance=max(variance, 0.0),
            unit=unit,
            own=(unit or 0.0) * 2 / seeds,
            share=2 / seeds,
        )

    def _unpaired(self, first: int, second: int, variance: float) -> Difference:
        sides = [self._values(arm, tuple(self.sheet.runs[arm])) for arm in (first, second)]
        known = [side_S for side_S in sides if len(side_S) > 1]
        dof = sum(len(side_S) - 1 for side_S in known)
        return Difference(
            difference=float(sides[0].mean() - sides[1].mean()),
            variance=variance,
            unit=sum(float(s_S.var(ddof=1)) * (len(s_S) - 1) for s_S in known) / dof if known else None,
            own=sum(_of_mean(side_S) for side_S in known),
            share=sum(1 / len(side_S) for side_S in sides),
        )

    @cached_property
    def _covariance(self) -> ndarray:
        """Covariance of the resampled means of all arms, (A, A)."""
        import numpy as np

        return np.cov(np.stack([self.drawn(arm) for arm in range(self.sheet.arms)]), ddof=0)

    def _values(self, arm: int, seeds: tuple[int, ...]) -> ndarray:
        return self.sheet.value_R[[self.sheet.runs[arm][seed] for seed in seeds]]

    def _seed_variance(self, arm: int) -> float:
        return _of_mean(self._values(arm, tuple(self.sheet.runs[arm])))


def _of_mean(values_S: ndarray) -> float:
    """Variance of the mean of some seeds; 0 for a single seed."""
    return float(values_S.var(ddof=1)) / len(values_S) if len(values_S) > 1 else 0.0
