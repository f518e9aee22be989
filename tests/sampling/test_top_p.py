"""Drawing from logits: exactly the set transformers would draw from, and the right shares within it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from limbeck.sampling.top_p import ATTEMPTS, draw, inside, nucleus, probabilities
from limbeck.types import Sampling

SETTINGS = [
    Sampling(temperature=0.8, top_p=0.95),
    Sampling(temperature=1.0, top_p=0.5),
    Sampling(temperature=1.7, top_p=0.05),
    Sampling(temperature=0.3, top_p=0.999),
    Sampling(temperature=0.8, top_p=0.9, top_k=7),
    Sampling(temperature=1.0, top_k=3),
]


def warped(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution of `generate(do_sample=True)`."""
    ids = torch.LongTensor([[0]] * len(logits_BV))
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits_BV)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)


def uniforms(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, ATTEMPTS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("vocab", [5, 100, 3000])
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_nucleus_is_the_set_transformers_keeps(sampling: Sampling, vocab: int, spread: float) -> None:
    logits_BV = spread * torch.randn(6, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(vocab))
    expected_BV = warped(logits_BV, sampling)
    got_BV = torch.zeros_like(expected_BV)
    for rows, ids_RK, weight_RK in nucleus(logits_BV, sampling):
        got_BV[rows[:, None], ids_RK] = weight_RK / weight_RK.sum(-1, keepdim=True)
    assert torch.equal(got_BV > 0, expected_BV > 0)
    torch.testing.assert_close(got_BV, expected_BV)


@pytest.mark.parametrize("sampling", [*SETTINGS, Sampling(temperature=0.7), Sampling(temperature=0.0)])
@pytest.mark.parametrize("vocab", [5, 100, 3000])
@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 8.0, 60.0])
def test_probabilities_are_those_of_transformers(sampling: Sampling, vocab: int, spread: float) -> None:
    logits_BV = spread * torch.randn(6, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(vocab))
    logits_BV += 1e-6 * torch.arange(vocab, 0, -1)  # of equal tokens the lower ids, as here
    before = logits_BV.clone()
    got_BV = probabilities(logits_BV, sampling)
    expected_BV = warped(logits_BV, replace(sampling, temperature=sampling.temperature or 1e-9))
    assert torch.equal(got_BV > 1e-12, expected_BV > 1e-12) and torch.equal(logits_BV, before)
    torch.testing.assert_close(got_BV, expected_BV)
    torch.testing.assert_close(probabilities(logits_BV.float(), sampling).sum(-1), torch.ones(6))


def test_probabilities_of_equal_tokens_leave_the_smallest_set() -> None:
    got_BV = probabilities(torch.zeros(2, 10, dtype=torch.float64), Sampling(top_p=0.35))
    torch.testing.assert_close(got_BV, torch.tensor([[0.25] * 4 + [0.0] * 6] * 2, dtype=torch.float64))


@pytest.mark.parametrize("sampling", [s for s in SETTINGS if not s.top_k])
def test_inside_agrees_with_transformers_for_every_token(sampling: Sampling) -> None:
    logits_BV = 2 * torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight_BV = (logits_BV / sampling.temperature).softmax(-1)
    got_VB = torch.stack([inside(weight_BV, torch.full((3,), token), sampling.top_p) for token in range(40)])
    assert torch.equal(got_VB.T, warped(logits_BV, sampling) > 0)


def test_ties_leave_the_smallest_set() -> None:
    weight_BV = torch.ones(1, 10, dtype=torch.float64)
    kept = [token for token in range(10) if inside(weight_BV, torch.tensor([token]), 0.35)]
    assert kept == [0, 1, 2, 3]


@pytest.mark.parametrize("sampling", [*SETTINGS, Sampling(temperature=0.7), Sampling(temperature=1.0, top_p=0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_are_those_of_the_warped_distribution(sampling: Sampling, dtype: torch.dtype) -> None:
    logits_V = 1.5 * torch.randn(12, dtype=dtype, generator=torch.Generator().manual_seed(5))
    count = 20_000
    ids = draw(logits_V.expand(count, -1).contiguous(), uniforms(count), sampling)
    expected_V = warped(logits_V[None].double(), sampling)[0]
    seen_V = torch.bincount(ids, minlength=12).double()
    assert not seen_V[expected_V == 0].any()
    support_V = expected_V > 0
    chi_square = ((seen_V - count * expected_V) ** 2 / (count * expected_V))[support_V].sum().item()
    freedom = int(support_V.sum()) - 1
    # Wilson and Hilferty's normal approximation, five standard deviations out.
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 0.0
    assert chi_square <= limit


def test_rows_that_refuse_every_attempt_are_sorted_and_stay_inside() -> None:
    # 400 equally light tokens and one at 30 %: a nucleus of 0.25 is that one, which an attempt misses 70 % of the time.
    logits_BV = torch.zeros(2000, 401, dtype=torch.float64)
    logits_BV[:, 17] = math.log(400 * 3 / 7)
    assert (draw(logits_BV, uniforms(2000), Sampling(top_p=0.25)) == 17).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=4)])
@pytest.mark.parametrize("number", [0.0, math.nextafter(1.0, 0.0)])
def test_extreme_numbers_hit_a_possible_token(sampling: Sampling, number: float) -> None:
    logits_BV = torch.full((3, 1000), -1e30, dtype=torch.float32)
    logits_BV[:, 300:310] = torch.randn(3, 10)
    ids = draw(logits_BV, torch.full((3, ATTEMPTS + 1), number, dtype=torch.float64), sampling)
    assert ((ids >= 300) & (ids < 310)).all()


@pytest.mark.parametrize("sampling", [Sampling(), *SETTINGS])
def test_a_row_draws_the_same_beside_any_neighbours(sampling: Sampling) -> None:
    logits_BV = 3 * torch.randn(9, 2500, generator=torch.Generator().manual_seed(7))
    logits_BV[::3] *= 0.05
    numbers = uniforms(9)
    together = draw(logits_BV, numbers, sampling)
    alone = torch.cat([draw(logits_BV[row : row + 1], numbers[row : row + 1], sampling) for row in range(9)])
    assert torch.equal(together, alone)


def test_temperature_zero_is_the_arg_max() -> None:
    logits_BV = torch.randn(4, 50)
    assert torch.equal(draw(logits_BV, uniforms(4), Sampling(temperature=0.0)), logits_BV.argmax(-1))
