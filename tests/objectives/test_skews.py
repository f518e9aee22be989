"""The skew KLs that DistiLLM-2 is made of: limits in alpha, bounds, Jensen-Shannon, the detached mixture."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.objectives import build_objective
from limbeck.objectives.base import Objective
from limbeck.objectives.temperature import scaled
from tests.objectives.cases import make_logits, make_rows

STUDENT, TEACHER, _ = make_logits()


def evaluate(name: str, student: torch.Tensor = STUDENT, teacher: torch.Tensor = TEACHER, **options):
    objective = build_objective(name, **options)
    assert isinstance(objective, Objective)
    return scaled(objective, make_rows(student, teacher))


@pytest.mark.parametrize("name", ["skl", "srkl"])
def test_alpha_near_one_is_nothing(name):
    value_N, grad_NV = evaluate(name, alpha=1 - 1e-7)
    assert value_N.abs().max() < 1e-10 and grad_NV.abs().max() < 1e-6


@pytest.mark.parametrize(("skew", "limit"), [("skl", "fkl"), ("srkl", "rkl")])
def test_alpha_near_zero_is_the_kl(skew, limit):
    expected_N, expected_NV = evaluate(limit)
    errors = []
    for alpha in (1e-6, 1e-8):
        value_N, grad_NV = evaluate(skew, alpha=alpha)
        errors.append(float((value_N - expected_N).abs().max() + (grad_NV - expected_NV).abs().max()))
    assert errors[1] < errors[0] / 20 < 1e-4


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 0.9])
def test_js_is_a_sum_of_skews_in_value_and_gradient(beta):
    """Why a mild skew on both sides is not in it: 0.1 on one is 0.9 on the other."""
    parts = [{"name": "skl", "alpha": beta, "weight": beta}, {"name": "srkl", "alpha": 1 - beta, "weight": 1 - beta}]
    for got, expected in zip(evaluate("sum", parts=parts), evaluate("js", beta=beta), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("name", ["skl", "srkl"])
def test_skews_reach_the_logarithm_of_one_over_alpha_and_never_exceed_it(name, alpha):
    value_N, _ = evaluate(name, alpha=alpha)
    assert value_N.max() < math.log(1 / alpha)
    rows = torch.tensor([[0, -2000]], dtype=torch.float64)
    apart, _ = evaluate(name, rows, rows.flip(-1), alpha=alpha)
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(1 / alpha)))


def test_what_detaching_the_mixture_leaves_out():
    """J_q (alpha q / m), which near equality is alpha of the gradient."""
    alpha = 0.1
    q, p = STUDENT.softmax(-1), TEACHER.softmax(-1)
    left_out = alpha * q * q / ((1 - alpha) * p + alpha * q)
    left_out = left_out - q * left_out.sum(-1, keepdim=True)
    _, full = evaluate("srkl", alpha=alpha)
    _, detached = evaluate("srkl", alpha=alpha, detach_mixture=True)
    torch.testing.assert_close(full, detached - left_out, rtol=1e-9, atol=1e-13)
    near = TEACHER + 1e-5 * (STUDENT - TEACHER)
    _, full = evaluate("srkl", near, alpha=alpha)
    _, detached = evaluate("srkl", near, alpha=alpha, detach_mixture=True)
    torch.testing.assert_close(full, (1 - alpha) * detached, rtol=1e-3, atol=1e-12)


def test_apart_the_detached_gradient_is_larger_and_nearly_of_one_direction():
    g = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2000, 50, generator=g, dtype=torch.float64)
    _, full = evaluate("srkl", student, teacher, alpha=0.1)
    _, detached = evaluate("srkl", student, teacher, alpha=0.1, detach_mixture=True)
    ratio = (full.norm(dim=-1) / detached.norm(dim=-1)).mean()
    cosine = torch.cosine_similarity(full, detached, dim=-1).mean()
    assert abs(ratio - 0.615) < 0.01 and abs(cosine - 0.966) < 0.005
