"""The geometry of curves: round axis marks, smoothing, thinning, and SVG paths. Plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A path of more points than a wide screen has pixels shows nothing more.
MOST_POINTS = 800


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear axis from `low` to `high` with marks at round values."""

    low: float
    high: float
    marks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Place of a value: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], *, marks: int = 5, zero: bool = False) -> Axis:
    """An axis around the values with about so many marks; `zero` makes it begin at 0 where no value is negative."""
    low, high = min(values), max(values)
    if zero and low >= 0:
        low = 0.0
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        high, low = (high + abs(high) * 0.1, low) if high else (1.0, low)
    rough = (high - low) / max(1, marks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    points = tuple(round(n * step, 12 - math.floor(math.log10(step))) for n in range(first, last + 1))
    return Axis(low=points[0], high=points[-1], marks=points)


def tight_axis(values: Sequence[float], *, marks: int = 5) -> Axis:
    """An axis that ends exactly with the values, for steps: marks only where they fall inside."""
    low, high = min(values), max(values)
    wide = axis(values, marks=marks)
    if low == high:
        around = max(0.5, 1e-6 * abs(low))
        return Axis(low=low - around, high=high + around, marks=(low,))
    return Axis(low=low, high=high, marks=tuple(mark for mark in wide.marks if low <= mark <= high))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window, cut off at both ends of the curve."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    half, N = window // 2, len(values)
    means = []
    for n in range(N):
        first, last = max(0, n - half), min(N, n + half + 1)
        means.append((total[last] - total[first]) / (last - first))
    return means


def thin(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Points to keep so that a curve keeps its peaks: lowest and highest of each of most/2 equal stretches."""
    N = len(values)
    if most >= N:
        return list(range(N))
    kept = {0, N - 1}
    stretches = (most - 2) // 2
    for part in range(stretches):
        stretch = range(part * N // stretches, (part + 1) * N // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def path(points: Sequence[tuple[float, float]]) -> str:
    """The SVG path through points (x, y), each rounded to a tenth."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
