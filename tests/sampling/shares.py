"""Do counts follow a distribution? Pearson's chi-square, five standard deviations out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_shares(ids_N: Tensor, probability_V: Tensor) -> None:
    """`ids_N` looks like a sample of `probability_V`; what is impossible never came. Rare outcomes count as one."""
    count = len(ids_N)
    seen_V = torch.bincount(ids_N, minlength=len(probability_V)).double()
    expected_V = count * probability_V.double() / probability_V.double().sum()
    assert not seen_V[expected_V == 0].any()
    rare_V = expected_V < 5
    seen_C = torch.cat([seen_V[~rare_V], seen_V[rare_V].sum()[None]])
    expected_C = torch.cat([expected_V[~rare_V], expected_V[rare_V].sum()[None]])
    if expected_C[-1] < 5:
        assert seen_C[-1] <= expected_C[-1] + 5 * math.sqrt(expected_C[-1]) + 3
        seen_C, expected_C = seen_C[:-1], expected_C[:-1]
    freedom = len(seen_C) - 1
    chi_square = ((seen_C - expected_C) ** 2 / expected_C).sum().item()
    # Wilson and Hilferty's normal approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert chi_square <= limit
