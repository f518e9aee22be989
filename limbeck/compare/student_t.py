"""Student's t: tail and quantile, since no dependency has them."""

from __future__ import annotations

import math
from statistics import NormalDist

# From so many degrees of freedom on it is the normal distribution to a thousandth.
MANY = 1000.0


def tail(value: float, dof: float) -> float:
    """The chance that Student's t lies further from 0 than `value`, either way.

    It is the incomplete beta function I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + value^2), by its continued
    fraction (Abramowitz and Stegun 1964, 26.5.8, evaluated by Lentz's method).
    """
    if dof >= MANY:
        return math.erfc(abs(value) / math.sqrt(2))
    x = dof / (dof + value * value)
    a, b = dof / 2, 0.5
    if x == 1:
        return 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # The fraction converges fast on this side of the mean only.
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    result = lower
    for m in range(1, 400):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            lower, upper = 1 / (1 + term * lower), 1 + term / upper
            result *= lower * upper
        if abs(lower * upper - 1) < 1e-14:
            break
    return result


def quantile(level: float, dof: float) -> float:
    """The value beyond which Student's t lies with probability `level`, both sides together."""
    # Its tails are heavier than the normal distribution's, so the value lies beyond that one's.
    low = -NormalDist().inv_cdf(level / 2)
    if dof >= MANY:
        return low
    high = 2 * low
    while tail(high, dof) > level:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, dof) > level else (low, middle)
    return (low + high) / 2
