"""What every objective promises, over the whole registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.objectives.base import Objective, TemperatureScale
from limbeck.objectives.sums import WeightedSum
from limbeck.objectives.temperature import scaled
from tests.objectives.cases import CASES, feels_shifts, has_kink, is_signed, is_teacherless, make_logits, make_rows

every = pytest.mark.parametrize("objective", CASES.values(), ids=CASES.keys())


def evaluate(
    objective: Objective, student, teacher, label, tau: float | Tensor = 1.0, scale: TemperatureScale = "auto"
):
    return scaled(objective, make_rows(student, teacher, label, tau, scale))


@every
@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
def test_closed_form_equals_autograd(objective, tau):
    student, teacher, label = make_logits()
    student.requires_grad_()
    value_N, grad_NV = evaluate(objective, student, teacher, label, tau)
    (autograd_NV,) = torch.autograd.grad(value_N.sum(), student)
    torch.testing.assert_close(grad_NV.detach(), autograd_NV, rtol=1e-10, atol=1e-12)


@every
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_gradient_sums_to_zero_and_shifts_do_nothing(objective, tau):
    student, teacher, label = make_logits()
    value_N, grad_NV = evaluate(objective, student, teacher, label, tau)
    assert value_N.shape == (8,) and grad_NV.shape == student.shape
    if feels_shifts(objective):
        return
    assert grad_NV.sum(-1).abs().max() < 1e-12 * max(1.0, float(grad_NV.abs().max()))
    shifted_N, shifted_NV = evaluate(objective, student + 5.0, teacher - 3.0, label, tau)
    torch.testing.assert_close(shifted_N, value_N, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(shifted_NV, grad_NV, rtol=1e-9, atol=1e-11)


@every
@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_value_is_not_negative_and_zero_at_equality(objective, tau):
    student, teacher, label = make_logits(n=40)
    value_N, _ = evaluate(objective, student, teacher, label, tau)
    assert value_N.min() >= 0 or is_signed(objective)
    if is_teacherless(objective):
        return
    assert value_N.max() > 0
    shift = 0.0 if feels_shifts(objective) or has_kink(objective) else 7.0
    equal_N, equal_NV = evaluate(objective, teacher + shift, teacher, label, tau)
    assert equal_N.abs().max() < 1e-11
    assert equal_NV.abs().max() < 1e-7


@every
def test_every_scale_is_the_same_at_temperature_one(objective):
    student, teacher, label = make_logits()
    expected_N, expected_NV = evaluate(objective, student, teacher, label)
    scales: list[TemperatureScale] = ["none", "tau", "tau2"]
    for scale in scales:
        value_N, grad_NV = evaluate(objective, student, teacher, label, scale=scale)
        torch.testing.assert_close(value_N, expected_N)
        torch.testing.assert_close(grad_NV, expected_NV)


@every
def test_a_factor_multiplies_value_and_gradient(objective):
    student, teacher, label = make_logits()
    plain_N, plain_NV = evaluate(objective, student, teacher, label, 2.0, "none")
    factors: list[tuple[TemperatureScale, float]] = [("tau", 2.0), ("tau2", 4.0), (3.5, 3.5)]
    for scale, factor in factors:
        factor = 1.0 if is_teacherless(objective) else factor
        value_N, grad_NV = evaluate(objective, student, teacher, label, 2.0, scale)
        torch.testing.assert_close(value_N, factor * plain_N, rtol=1e-14, atol=0)
        torch.testing.assert_close(grad_NV, factor * plain_NV, rtol=1e-13, atol=1e-18)


def test_the_factor_leaves_cross_entropy_in_a_sum_alone():
    student, teacher, label = make_logits()
    both = WeightedSum(parts=((0.5, CASES["fkl()"]), (0.25, CASES["ce()"])))
    value_N, grad_NV = evaluate(both, student, teacher, label, 2.0, "tau2")
    kl_N, kl_NV = evaluate(CASES["fkl()"], student, teacher, label, 2.0, "none")
    ce_N, ce_NV = evaluate(CASES["ce()"], student, teacher, label)
    torch.testing.assert_close(value_N, 2 * kl_N + 0.25 * ce_N)
    torch.testing.assert_close(grad_NV, 2 * kl_NV + 0.25 * ce_NV)


@every
def test_a_temperature_each_token_equals_a_loop(objective):
    student, teacher, label = make_logits()
    tau_N = torch.linspace(0.6, 4.0, 8, dtype=torch.float64)
    value_N, grad_NV = evaluate(objective, student, teacher, label, tau_N)
    for i, tau in enumerate(tau_N.tolist()):
        one_N, one_NV = evaluate(objective, student[i : i + 1], teacher[i : i + 1], label[i : i + 1], tau)
        torch.testing.assert_close(value_N[i : i + 1], one_N, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(grad_NV[i : i + 1], one_NV, rtol=1e-10, atol=1e-13)


@every
def test_impossible_entries_contaminate_nothing(objective):
    student, teacher, label = make_logits()
    value_N, grad_NV = evaluate(objective, student, teacher, label, 2.0)
    slots = torch.full((8, 3), -torch.inf, dtype=torch.float64)
    padded_N, padded_NV = evaluate(
        objective, torch.cat([student, slots], 1), torch.cat([teacher, slots], 1), label, 2.0
    )
    torch.testing.assert_close(padded_N, value_N, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(padded_NV[:, :-3], grad_NV, rtol=1e-10, atol=1e-12)
    assert torch.equal(padded_NV[:, -3:], torch.zeros_like(slots))


@every
def test_float32_stays_close_to_float64(objective):
    student, teacher, label = make_logits(n=32)
    student, teacher = student.float(), teacher.float()
    exact_N, exact_NV = evaluate(objective, student.double(), teacher.double(), label, 2.0)
    value_N, grad_NV = evaluate(objective, student, teacher, label, 2.0)
    assert value_N.dtype == grad_NV.dtype == torch.float32
    assert value_N.min() >= -1e-7 or is_signed(objective)
    torch.testing.assert_close(value_N.double(), exact_N, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(grad_NV.double(), exact_NV, rtol=1e-3, atol=1e-4 * float(exact_NV.abs().max()))
