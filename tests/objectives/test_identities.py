"""Exact identities and limits between objectives, in float64: the temperature axis and concrete score distillation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.objectives import build_objective
from limbeck.objectives.adaptive import temperature_of_head
from limbeck.objectives.base import Objective
from limbeck.objectives.temperature import scaled
from limbeck.types import LimbeckError
from tests.objectives.cases import WEIGHTINGS, make_logits, make_rows

STUDENT, TEACHER, _ = make_logits()
D = STUDENT - TEACHER
PAIRS = list(itertools.combinations_with_replacement(WEIGHTINGS, 2))


def evaluate(
    name: str, tau: float = 1.0, scale: Any = "auto", student: Tensor = STUDENT, teacher: Tensor = TEACHER, **options
):
    objective = build_objective(name, **options)
    assert isinstance(objective, Objective)
    return scaled(objective, make_rows(student, teacher, tau=tau, scale=scale))


def variance(weight: Tensor, x: Tensor) -> Tensor:
    mean = (weight * x).sum(-1, keepdim=True)
    return (weight * (x - mean) ** 2).sum(-1)


def weights(kind: str, tau: float = 1.0, share: float = 0.15) -> Tensor:
    q, p = (STUDENT / tau).softmax(-1), (TEACHER / tau).softmax(-1)
    return {
        "student": q,
        "teacher": p,
        "uniform": torch.full_like(q, 1 / q.shape[-1]),
        "mixture": share * p + (1 - share) * q,
    }[kind]


# --- the path from p to q (T3) ---


@pytest.mark.parametrize("tau", [1.0, 2.0, 8.0])
def test_kls_are_integrals_of_the_variance_of_the_logit_error(tau):
    nodes, sizes = np.polynomial.legendre.leggauss(200)
    forward = reverse = gradient = 0
    for x, w in zip((nodes + 1) / 2, sizes / 2, strict=True):
        r = ((TEACHER + x * D) / tau).softmax(-1)
        v = variance(r, D)
        forward, reverse = forward + w * (1 - x) * v, reverse + w * x * v
        gradient = gradient + w * r * (D - (r * D).sum(-1, keepdim=True))
    (fkl, fkl_grad), (rkl, rkl_grad) = evaluate("fkl", tau), evaluate("rkl", tau)
    torch.testing.assert_close(fkl, forward, rtol=1e-10, atol=0)
    torch.testing.assert_close(rkl, reverse, rtol=1e-10, atol=0)
    torch.testing.assert_close(fkl_grad, gradient, rtol=1e-9, atol=1e-13)
    q = (STUDENT / tau).softmax(-1)
    torch.testing.assert_close(rkl_grad, q * (D - (q * D).sum(-1, keepdim=True)), rtol=1e-9, atol=1e-13)


# --- high temperature (T4-T6) ---

UNIFORM_VARIANCE = D.var(-1, correction=0)
LIMITS = [
    ("fkl", {}, 0.5),
    ("rkl", {}, 0.5),
    ("symmetric_kl", {"forward": 0.3}, 0.5),
    ("jeffreys", {}, 1.0),
    ("skl", {"alpha": 0.1}, 0.405),
    ("srkl", {"alpha": 0.1}, 0.405),
    ("js", {"beta": 0.5}, 0.125),
    ("js", {"beta": 0.1}, 0.045),
    ("js", {"beta": 0.1, "form": "endpoint"}, 0.365),
    ("js", {"beta": 0.1, "form": "normalized"}, 0.5),
    ("ab", {"alpha": 0.5, "beta": 0.5}, 0.5),
    ("ab", {"alpha": 0.2, "beta": 0.7}, 0.5 * 257**0.1),
    ("ab", {"alpha": 1, "beta": 1}, 0.5 / 257),
    ("akl", {}, 0.5),
    ("todi", {}, 1.0),
    ("taid", {"progress": 0.4}, 0.08),
    ("amid", {"alpha": -1.0, "share": 0.1}, 0.405),
    ("amid", {"alpha": 1.0, "share": 0.1}, 0.405),
    ("amid", {"alpha": 3.0, "share": 0.1}, 0.405),
    ("tad", {"tail_weight": 1.0}, 0.5),
]


@pytest.mark.parametrize(("name", "options", "size"), LIMITS, ids=lambda x: str(x))
def test_limit_at_high_temperature(name, options, size):
    value_N, _ = evaluate(name, 1e4, **options)
    torch.testing.assert_close(value_N / UNIFORM_VARIANCE, torch.full_like(value_N, size), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "size"), [("fkl", 1.0), ("rkl", 1.0), ("todi", 1.5)])
def test_gradient_at_high_temperature(name, size):
    _, grad_NV = evaluate(name, 1e4)
    expected = size * (D - D.mean(-1, keepdim=True)) / 257
    assert (grad_NV - expected).abs().max() < 0.02 / 257


def test_total_variation_is_of_first_order():
    expected = (D - D.mean(-1, keepdim=True)).abs().mean(-1) / 2
    torch.testing.assert_close(evaluate("tv", 1e4)[0], expected, rtol=1e-3, atol=0)
    assert (evaluate("tv", 1e4, "tau2")[0] > 1e3 * expected).all()


def test_the_log_of_the_acceptance_is_of_first_order_too():
    expected = (D - D.mean(-1, keepdim=True)).abs().mean(-1) / 2
    torch.testing.assert_close(evaluate("lk", 1e4)[0], expected, rtol=1e-3, atol=0)


def test_the_gap_of_the_kls_is_the_skewness_of_the_error():
    third = ((D - D.mean(-1, keepdim=True)) ** 3).mean(-1)
    gap = 1024 * (evaluate("rkl", 1024.0)[0] - evaluate("fkl", 1024.0)[0])
    large = third.abs() > 0.05
    assert large.any()
    torch.testing.assert_close(gap[large], third[large] / 6, rtol=0.05, atol=0)


def test_standardised_logits_become_a_correlation():
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(STUDENT, TEACHER, strict=True)])
    torch.testing.assert_close(evaluate("lskd", 1e4)[0], 1 - correlation, rtol=1e-3, atol=0)


def test_standardised_logits_ignore_scale_and_shift():
    value_N, grad_NV = evaluate("lskd", 2.0)
    assert ((STUDENT - STUDENT.mean(-1, keepdim=True)) * grad_NV).sum(-1).abs().max() < 1e-14
    other_N, _ = evaluate("lskd", 2.0, student=3 * STUDENT + 1, teacher=0.5 * TEACHER - 2)
    torch.testing.assert_close(other_N, value_N, rtol=1e-10, atol=1e-13)


# --- the acceptance of drafts ---


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_lk_is_the_naive_line(tau):
    p, q = (TEACHER / tau).softmax(-1), (STUDENT / tau).softmax(-1)
    accepted = torch.minimum(p, q).sum(-1)
    value, grad = evaluate("lk", tau, "none")
    torch.testing.assert_close(value, -accepted.log(), rtol=1e-12, atol=0)
    # The gradient of total variation, over the acceptance: what is rarely accepted moves no less.
    torch.testing.assert_close(grad, evaluate("tv", tau, "none")[1] / accepted[:, None], rtol=1e-9, atol=1e-14)
    share = (-2 * accepted).exp()
    mixed = share * tau**2 * (p * (p / q).log()).sum(-1) + (1 - share) * tau * (1 - accepted)
    torch.testing.assert_close(evaluate("lk", tau, form="lambda", eta=2.0)[0], mixed, rtol=1e-12, atol=0)


def test_lk_of_a_teacher_without_doubt_is_cross_entropy():
    sure = torch.full_like(TEACHER, -torch.inf)
    sure[:, 3] = 0.0
    student = STUDENT.clone()
    student[:, 3] -= 6.0
    value, grad = evaluate("lk", student=student, teacher=sure)
    torch.testing.assert_close(value, -student.log_softmax(-1)[:, 3])
    torch.testing.assert_close(grad, student.softmax(-1) - torch.nn.functional.one_hot(torch.tensor(3), 257))


def test_lk_moves_a_student_that_shares_nothing_with_its_teacher():
    """Total variation is flat there, and the acceptance is no number of float32."""
    far = torch.zeros(1, 5)
    student, teacher = far.clone(), far.clone()
    student[:, 0], teacher[:, 1] = 300.0, 300.0
    value, grad = evaluate("lk", student=student, teacher=teacher)
    torch.testing.assert_close(value, torch.full((1,), 300.0) - torch.tensor(5.0).log(), rtol=1e-6, atol=0)
    assert (evaluate("tv", student=student, teacher=teacher)[1]).abs().max() < 1e-30
    torch.testing.assert_close(grad, torch.tensor([[0.5, -0.2, -0.1, -0.1, -0.1]]))


@pytest.mark.parametrize(
    ("options", "said"), [({"form": "beta"}, "expected one of alpha, lambda"), ({"eta": -1.0}, "3 is the paper's")]
)
def test_lk_refuses_what_it_does_not_know(options, said):
    with pytest.raises(LimbeckError, match=said):
        build_objective("lk", **options)


# --- limits in the options (T9 and docstrings) ---


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("js", {"beta": 0.0, "form": "endpoint"}), ("fkl", {})),
        (("lk", {"form": "lambda", "eta": 0.0}), ("fkl", {})),
        (("js", {"beta": 1.0, "form": "endpoint"}), ("rkl", {})),
        (("js", {"beta": 0.5, "form": "endpoint"}), ("js", {"beta": 0.5})),
        (("ab", {"alpha": 1, "beta": 0}), ("fkl", {})),
        (("ab", {"alpha": 0, "beta": 1}), ("rkl", {})),
        (("symmetric_kl", {"forward": 1.0}), ("fkl", {})),
        (("symmetric_kl", {"forward": 0.0}), ("rkl", {})),
        (("taid", {"progress": 1.0}), ("fkl", {})),
        (("tad", {"tail_weight": 1.0, "k": 5}), ("fkl", {})),
        (("amid", {"alpha": -1.0, "share": 0.2}), ("skl", {"alpha": 0.2})),
        (("amid", {"alpha": -1.0, "share": 0.8, "between": "student_assistant"}), ("srkl", {"alpha": 0.2})),
        (("csd", {"share": 0.0, "first": "mixture", "second": "mixture"}), ("csd", {})),
        (("eopd", {"threshold": 100.0}), ("rkl", {})),
        (("eopd", {"threshold": -1.0, "mode": "switch"}), ("fkl", {})),
    ],
    ids=str,
)
def test_named_limits_are_exact(left, right):
    value_N, grad_NV = evaluate(left[0], 2.0, **left[1])
    expected_N, expected_NV = evaluate(right[0], 2.0, **right[1])
    torch.testing.assert_close(value_N, expected_N, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(grad_NV, expected_NV, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("near", "limit", "tolerance"),
    [
        (("ab", {"alpha": 1e-6, "beta": 0.7}), ("ab", {"alpha": 0, "beta": 0.7}), 1e-4),
        (("ab", {"alpha": 0.7, "beta": 1e-6}), ("ab", {"alpha": 0.7, "beta": 0}), 1e-4),
        (("ab", {"alpha": 0.5, "beta": -0.5 + 1e-7}), ("ab", {"alpha": 0.5, "beta": -0.5}), 1e-4),
        (("ab", {"alpha": 1e-4, "beta": -1e-4}), ("ab", {"alpha": 0, "beta": 0}), 1e-2),
        (("amid", {"alpha": 1 - 1e-6, "share": 0.3}), ("amid", {"alpha": 1.0, "share": 0.3}), 1e-4),
        (("skl", {"alpha": 1e-9}), ("fkl", {}), 1e-4),
        (("srkl", {"alpha": 1e-9}), ("rkl", {}), 1e-4),
    ],
    ids=str,
)
def test_limits_are_approached(near, limit, tolerance):
    value_N, grad_NV = evaluate(near[0], **near[1])
    expected_N, expected_NV = evaluate(limit[0], **limit[1])
    torch.testing.assert_close(value_N, expected_N, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_NV, expected_NV, rtol=tolerance, atol=tolerance)


def test_js_over_beta_tends_to_forward_kl():
    _, grad_NV = evaluate("js", beta=1e-9)
    assert (grad_NV / 1e-9 - evaluate("fkl")[1]).abs().max() < 1e-4


def test_hellinger_and_squared_error():
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    torch.testing.assert_close(evaluate("ab", alpha=0.5, beta=0.5)[0], 4 * (1 - (p * q).sqrt().sum(-1)))
    torch.testing.assert_close(evaluate("ab", alpha=1, beta=1)[0], ((p - q) ** 2).sum(-1) / 2)


def test_tempering_the_teacher_alone(tau=3.0):
    """TTM: tau KL(p_tau || q_tau) = KL(p_tau || q) + (tau - 1) (H_{1/tau}(q) - H(p_tau)), H_a Renyi's entropy (T8)."""
    p_tau, log_q = (TEACHER / tau).softmax(-1), STUDENT.log_softmax(-1)
    renyi = (log_q / tau).logsumexp(-1) / (1 - 1 / tau)
    entropy = -(p_tau * p_tau.log()).sum(-1)
    one_sided = (p_tau * (p_tau.log() - log_q)).sum(-1)
    torch.testing.assert_close(
        tau * evaluate("fkl", tau, "none")[0], one_sided + (tau - 1) * (renyi - entropy), rtol=1e-10, atol=0
    )


def test_akl_splits_where_a_sort_splits():
    log_p = TEACHER.log_softmax(-1)
    for mu in (0.1, 0.5, 0.9):
        order = log_p.argsort(-1, descending=True)
        first = log_p.exp().gather(-1, order).cumsum(-1) <= mu
        first[:, 0] = True
        expected = torch.zeros_like(first).scatter(-1, order, first)
        assert torch.equal(temperature_of_head(log_p, log_p.exp(), mu), expected)
        assert torch.equal(temperature_of_head(log_p.float(), log_p.float().exp(), mu), expected)


# --- concrete score distillation ---


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_csd_is_the_double_sum_over_pairs(first, second):
    w1, w2 = weights(first, 2.0), weights(second, 2.0)
    residual = (D.unsqueeze(-1) - D.unsqueeze(-2)) ** 2
    expected = torch.einsum("ny,nx,nxy->n", w1, w2, residual) / 2
    value_N, grad_NV = evaluate("csd", 2.0, first=first, second=second)
    torch.testing.assert_close(value_N, expected, rtol=1e-11, atol=0)
    mirrored_N, mirrored_NV = evaluate("csd", 2.0, first=second, second=first)
    torch.testing.assert_close(mirrored_N, value_N)
    torch.testing.assert_close(mirrored_NV, grad_NV)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_csd_gradient_by_finite_differences_of_the_frozen_double_sum(first, second):
    w1, w2 = weights(first), weights(second)

    def frozen(student: Tensor) -> Tensor:
        d = student - TEACHER
        return torch.einsum("ny,nx,nxy->n", w1, w2, (d.unsqueeze(-1) - d.unsqueeze(-2)) ** 2).sum() / 2

    direction = torch.randn(STUDENT.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numeric = (frozen(STUDENT + 1e-5 * direction) - frozen(STUDENT - 1e-5 * direction)) / 2e-5
    _, grad_NV = evaluate("csd", first=first, second=second)
    torch.testing.assert_close((grad_NV * direction).sum(), numeric, rtol=1e-7, atol=0)


@pytest.mark.parametrize("tau", [1.0, 1.5, 3.0])
def test_csd_student_student_is_reverse_kl_times_two(tau):
    _, csd_NV = evaluate("csd", tau)
    _, rkl_NV = evaluate("rkl", tau, "tau2")
    torch.testing.assert_close(csd_NV, 2 * rkl_NV, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(evaluate("csd", tau)[0], variance(weights("student", tau), D))


def test_csd_zero_only_where_the_error_is_constant():
    shifted_N, shifted_NV = evaluate("csd", student=TEACHER + 2.5, first="uniform", second="teacher")
    assert shifted_N.abs().max() < 1e-20 and shifted_NV.abs().max() < 1e-12
    bent = TEACHER.clone()
    bent[:, 0] += 1e-3
    assert (evaluate("csd", student=bent, first="uniform", second="uniform")[0] > 0).all()


def test_csd_uniform_is_centred_logit_matching():
    value_N, grad_NV = evaluate("csd", first="uniform", second="uniform")
    direct_N, direct_NV = evaluate("dld", weighting="uniform", normalize="mean")
    torch.testing.assert_close(value_N, 2 * direct_N)
    torch.testing.assert_close(grad_NV, 2 * direct_NV)


def test_csd_teacher_student_contains_forward_kl():
    _, grad_NV = evaluate("csd", first="teacher", second="student")
    p, q = weights("teacher"), weights("student")
    jeffreys = evaluate("jeffreys")[0].unsqueeze(-1)
    teachers = p * (D - (p * D).sum(-1, keepdim=True))
    torch.testing.assert_close(grad_NV, evaluate("rkl")[1] + teachers + jeffreys * (q - p), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_csd_with_equal_weights_is_logit_matching_at_the_best_shift(kind):
    w, centre = weights(kind), (weights(kind) * D).sum(-1, keepdim=True)
    at_best = (w * (D - centre) ** 2).sum(-1)
    torch.testing.assert_close(evaluate("csd", first=kind, second=kind)[0], at_best)
    for off in (-0.1, 0.1):
        assert ((w * (D - centre - off) ** 2).sum(-1) > at_best).all()


def test_csd_teacher_teacher_is_forward_kl_to_second_order():
    errors = []
    for size in (1e-2, 1e-3):
        student = TEACHER + size * D
        half = evaluate("csd", student=student, first="teacher", second="teacher")[0] / 2
        errors.append((half - evaluate("fkl", student=student)[0]).abs().mean())
    assert 500 < errors[0] / errors[1] < 2000


def test_csd_monte_carlo_estimate_is_unbiased():
    g = torch.Generator().manual_seed(3)
    p, q, d = weights("teacher")[0], weights("student")[0], D[0]
    x, y = q.multinomial(400_000, True, generator=g), p.multinomial(400_000, True, generator=g)
    draws = (d[x] - d[y]) ** 2 / 2
    error = draws.std() / draws.numel() ** 0.5
    assert (draws.mean() - evaluate("csd", first="teacher", second="student")[0][0]).abs() < 4 * error


def test_csd_with_gradient_through_the_weights_differs():
    assert not torch.allclose(evaluate("csd")[1], evaluate("csd", detach=False)[1], rtol=0.1)
    q = weights("student")
    spread = (D - (q * D).sum(-1, keepdim=True)) ** 2
    through = q * (spread - (q * spread).sum(-1, keepdim=True))
    torch.testing.assert_close(evaluate("csd", detach=False)[1], evaluate("csd")[1] + through, rtol=1e-10, atol=1e-13)


def test_low_rank_sums_of_pairs_are_sums():
    parts = [{"name": "csd", "first": "teacher", "second": "student", "weight": 0.4}, {"name": "csd", "weight": 0.6}]
    residual = (D.unsqueeze(-1) - D.unsqueeze(-2)) ** 2
    joint = 0.4 * torch.einsum("ny,nx->nyx", weights("teacher"), weights("student"))
    joint = joint + 0.6 * torch.einsum("ny,nx->nyx", weights("student"), weights("student"))
    torch.testing.assert_close(evaluate("sum", parts=parts)[0], (joint * residual).sum((-1, -2)) / 2)
