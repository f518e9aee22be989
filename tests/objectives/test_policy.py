"""Objectives on the sampled token: what they are on average over the student's own tokens, and what they do to one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.objectives import Temperature, build_objective, topk_signal
from limbeck.objectives.base import Objective
from limbeck.objectives.temperature import scaled
from limbeck.types import LimbeckError
from tests.objectives.cases import make_logits, make_rows
from tests.objectives.pairs import Pair

pytestmark = pytest.mark.filterwarnings("ignore:opd is unbiased")


def evaluate(name: str, student: Tensor, teacher: Tensor, label: Tensor, tau: float = 1.0, **options):
    objective = build_objective(name, **options)
    assert isinstance(objective, Objective)
    return scaled(objective, make_rows(student, teacher, label, tau))


def expected(name: str, drawn_NV: Tensor, student: Tensor, teacher: Tensor, tau: float, **options):
    """Value and gradient on average over labels drawn from these distributions, by enumeration."""
    value_N, grad_NV = torch.zeros(len(student), dtype=student.dtype), torch.zeros_like(student)
    for y in range(student.shape[1]):
        one_N, one_NV = evaluate(name, student, teacher, torch.full((len(student),), y), tau, **options)
        value_N += drawn_NV[:, y] * one_N
        grad_NV += drawn_NV[:, y : y + 1] * one_NV
    return value_N, grad_NV


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_opd_on_the_students_own_tokens_is_reverse_kl(tau):
    student, teacher, label = make_logits(v=31)
    value_N, grad_NV = expected("opd", (student / tau).softmax(-1), student, teacher, tau)
    expected_N, expected_NV = evaluate("rkl", student, teacher, label, tau)
    torch.testing.assert_close(value_N, expected_N, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad_NV, expected_NV, rtol=1e-11, atol=1e-13)


def test_the_estimators_of_opd_on_the_students_own_tokens():
    student, teacher, label = make_logits(v=31, size=1.0)
    own_NV = student.softmax(-1)
    reverse_N, reverse_NV = evaluate("rkl", student, teacher, label)
    _, forward_NV = evaluate("fkl", student, teacher, label)
    log_ratio_NV = student.log_softmax(-1) - teacher.log_softmax(-1)
    found = {k: expected("opd", own_NV, student, teacher, 1.0, estimator=k) for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(found["k3"][0], reverse_N, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found["k2"][0], (own_NV * log_ratio_NV**2 / 2).sum(-1), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found["k2"][1], reverse_NV, rtol=1e-11, atol=1e-13)
    # What is differentiated as a loss is another divergence than what it estimates.
    torch.testing.assert_close(found["k3"][1], forward_NV, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_an_estimator_is_the_published_line(estimator):
    student, teacher, label = make_logits(size=1.0)
    student.requires_grad_()
    log_q_N, log_p_N = (t.log_softmax(-1).gather(-1, label[:, None])[:, 0] for t in (student, teacher))
    log_ratio_N = log_p_N - log_q_N
    published_N = {"k2": log_ratio_N**2 / 2, "k3": log_ratio_N.exp() - 1 - log_ratio_N}[estimator]
    (expected_NV,) = torch.autograd.grad(published_N.sum(), student)
    value_N, grad_NV = evaluate("opd", student, teacher, label, estimator=estimator)
    torch.testing.assert_close(value_N, published_N)
    torch.testing.assert_close(grad_NV, expected_NV)


@pytest.mark.parametrize("drawn", ["teacher", "another temperature"])
def test_opd_on_other_tokens_is_not(drawn):
    student, teacher, label = make_logits(v=31)
    drawn_NV = (teacher if drawn == "teacher" else student / 2).softmax(-1)
    _, grad_NV = expected("opd", drawn_NV, student, teacher, 1.0)
    _, expected_NV = evaluate("rkl", student, teacher, label)
    assert (grad_NV - expected_NV).norm() > 0.2 * expected_NV.norm()


def test_opd_is_minus_the_advantage_times_log_q():
    student, teacher, label = make_logits()
    student.requires_grad_()
    log_q_N, log_p_N = (t.log_softmax(-1).gather(-1, label[:, None])[:, 0] for t in (student, teacher))
    advantage_N = (log_p_N - log_q_N).detach()
    (expected_NV,) = torch.autograd.grad((-advantage_N * log_q_N).sum(), student)
    value_N, grad_NV = evaluate("opd", student, teacher, label)
    torch.testing.assert_close(value_N, -advantage_N)
    torch.testing.assert_close(grad_NV, expected_NV)
    assert value_N.min() < 0 < value_N.max(), "it is signed"


def test_opd_clips_the_advantage_and_not_the_value():
    student, teacher, label = make_logits()
    plain_N, _ = evaluate("opd", student, teacher, label)
    clipped_N, clipped_NV = evaluate("opd", student, teacher, label, clip=0.5)
    torch.testing.assert_close(clipped_N, plain_N)
    onehot_NV = torch.nn.functional.one_hot(label, student.shape[1])
    torch.testing.assert_close(clipped_NV, plain_N.clamp(-0.5, 0.5)[:, None] * (onehot_NV - student.softmax(-1)))
    assert (plain_N.abs() > 0.5).any()


def test_labels_that_are_ignored_count_as_zero():
    student, teacher, label = make_logits()
    label[3] = -100
    for name in ("opd", "policy_gradient"):
        value_N, grad_NV = evaluate(name, student, teacher, label)
        assert value_N[3] == 0 and not grad_NV[3].any() and value_N[2] != 0


def test_opd_needs_the_teachers_log_probability_of_every_token():
    pair = Pair()
    with pytest.raises(LimbeckError, match="not defined on support 'topk_tail'"):
        pair.fused(build_objective("opd"), signal=topk_signal(pair.teacher_logits(), 4))
    with pytest.raises(LimbeckError, match="reads labels"):
        pair.fused(build_objective("opd"), label_N=None)


@pytest.mark.filterwarnings("default:opd is unbiased")
def test_opd_warns_where_it_is_tempered():
    pair = Pair()
    pair.fused(build_objective("opd"))
    with pytest.warns(UserWarning, match="sample at it"):
        pair.fused(build_objective("opd"), 2.0)


def test_policy_gradient_is_cross_entropy_times_the_advantage():
    pair = Pair(bias=True)
    ce = build_objective("ce")
    pair.check(pair.fused(build_objective("policy_gradient"), 2.0, signal=None), pair.naive(ce))
    advantage_N = torch.linspace(-2, 3, pair.n, dtype=torch.float64)
    for name in ("advantage", "policy_gradient.advantage"):
        fused = pair.fused(build_objective("policy_gradient"), signal=None, token_options={name: advantage_N})
        pair.check(fused, advantage_N * pair.naive(ce))


def test_policy_gradient_stands_beside_a_divergence():
    pair = Pair()
    both = build_objective("sum", parts=["rkl", {"name": "policy_gradient", "weight": 0.5}])
    advantage_N = torch.linspace(-2, 3, pair.n, dtype=torch.float64)
    fused = pair.fused(both, Temperature(loss=2.0), token_options={"advantage": advantage_N})
    expected_N = pair.naive(build_objective("rkl"), 2.0) + 0.5 * advantage_N * pair.naive(build_objective("ce"))
    pair.check(fused, expected_N)
    assert list(fused.parts) == ["rkl", "policy_gradient"]


def test_an_impossible_token_without_an_advantage_has_no_say():
    student, teacher, label = make_logits(n=2)
    student[0, label[0]] = -torch.inf
    value_N, grad_NV = evaluate("policy_gradient", student, teacher, label, advantage=0.0)
    assert not value_N.any() and not grad_NV.any()


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("opd", {"clip": -1.0}, "opd clip=-1.0: expected zero"),
        ("opd", {"clip": float("inf")}, "opd clip=inf"),
        ("policy_gradient", {"advantage": float("nan")}, "advantage=nan: expected a finite number"),
    ],
)
def test_options_out_of_range_are_refused(name, options, match):
    with pytest.raises(LimbeckError, match=match):
        build_objective(name, **options)


def test_an_advantage_that_is_no_number_is_refused():
    pair = Pair()
    advantage_N = torch.ones(pair.n).index_fill(0, torch.tensor([3]), torch.nan)
    with pytest.raises(LimbeckError, match="advantage=nan"):
        pair.fused(build_objective("policy_gradient"), signal=None, token_options={"advantage": advantage_N})
