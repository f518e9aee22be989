"""What whole responses tell the objectives: adaptive alpha, beta over training, DPKD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.objectives import (
    AdaptiveAlpha,
    Beta,
    build_objective,
    dpkd_advantage,
    label_logp,
    sequence_mean,
    topk_signal,
)
from limbeck.types import LimbeckError
from tests.objectives.pairs import Pair
from tests.objectives.test_precision import Largest


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# --- log-probabilities of whole responses ---


def naive_logp(pair: Pair) -> list[Tensor]:
    label_N1, counts_N = pair.label_N.clamp_min(0)[:, None], pair.label_N != -100
    logits = (pair.student_logits(), pair.teacher_logits())
    return [torch.where(counts_N, t.log_softmax(-1).gather(-1, label_N1)[:, 0], 0.0) for t in logits]


@pytest.mark.parametrize("tile_bytes", [1, 1 << 30])
def test_log_probabilities_of_labels_equal_naive(tile_bytes):
    pair = Pair(n=301, bias=True, scale=2.0, softcap=5.0)
    found = label_logp(pair.hidden, pair.head, pair.signal, pair.label_N, tile_bytes)
    for got, expected in zip(found, naive_logp(pair), strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected.detach())


def test_log_probabilities_never_hold_the_logits():
    pair = Pair(dtype=torch.float32, n=1600, v=1501, d=8)
    with Largest() as watch:
        log_q_N, _ = label_logp(pair.hidden, pair.head, pair.signal, pair.label_N, 1 << 20)
    assert log_q_N.dtype == torch.float32 and watch.numel <= 256 * pair.v


def test_no_tokens_have_no_log_probabilities():
    pair = Pair(n=0)
    assert [t.shape for t in label_logp(pair.hidden, pair.head, pair.signal, pair.label_N)] == [(0,), (0,)]


def test_log_probabilities_need_the_whole_row():
    pair = Pair()
    with pytest.raises(LimbeckError, match="TopKSignal does not hold every label"):
        label_logp(pair.hidden, pair.head, topk_signal(pair.teacher_logits(), 4), pair.label_N)
    with pytest.raises(LimbeckError, match=r"label_N has shape \(44,\): expected \(45,\)"):
        label_logp(pair.hidden, pair.head, pair.signal, pair.label_N[1:])


def test_the_mean_of_a_sequence():
    value_N = f64(1, 2, 6, 5, 3).requires_grad_()
    mean_B = sequence_mean(value_N, torch.tensor([0, 0, 0, 2, 2]), 4)
    assert mean_B.tolist() == [3.0, 0.0, 4.0, 0.0]
    (grad,) = torch.autograd.grad(mean_B @ f64(1, 1, 10, 1), value_N)
    torch.testing.assert_close(grad, f64(1 / 3, 1 / 3, 1 / 3, 5, 5))


# --- adaptive alpha ---


def test_the_gap_is_how_much_more_likely_its_author_finds_a_response():
    log_q_B, log_p_B = f64(0.2, 0.2, 0.9).log(), f64(0.5, 0.5, 0.3).log()
    gap_B = AdaptiveAlpha().gap_B(log_q_B, log_p_B, torch.tensor([False, True, True]))
    torch.testing.assert_close(gap_B, f64(0.3, -0.3, 0.6))


@pytest.mark.parametrize(
    ("gap", "alpha"),
    [
        (0.4, 0.1),  # 1 - 0.9 * 0.5 = 0.55, clipped
        (0.2, 0.1),  # the reference itself
        (0.19, 1 - 0.18 / 0.19),  # 0.0526
        (0.185, 1 - 0.18 / 0.185),  # 0.0270
        (0.1818, 0.01),  # 0.0099, clipped
        (0.05, 0.01),
        (1e-6, 0.01),
        (0.0, 0.01),
        (-9e-6, 0.01),
        (-2e-5, 0.1),
        (-0.4, 0.1),
    ],
)
def test_alpha_by_hand(gap, alpha):
    found = AdaptiveAlpha().alpha_B(f64(gap), 0.2)
    torch.testing.assert_close(found, f64(alpha), rtol=1e-12, atol=1e-15)


def test_alpha_is_nearly_a_switch():
    """The way from low to high is 9 % of the reference wide, below it."""
    reference = 0.37
    share = torch.linspace(0, 3, 30001, dtype=torch.float64)
    alpha = AdaptiveAlpha().alpha_B(share * reference, reference)
    between = share[(alpha > 0.01 + 1e-9) & (alpha < 0.1 - 1e-9)]
    assert abs(between.min() - 0.9 / 0.99) < 2e-4 and abs(between.max() - 1) < 2e-4
    assert abs((between.max() - between.min()) - 0.0909) < 3e-4


def test_alpha_keeps_the_step_of_the_reference_where_it_is_not_clipped():
    rule, gap_B = AdaptiveAlpha(alpha0=0.3, low=0.001, high=0.9), f64(0.21, 0.25, 0.4, 0.9)
    torch.testing.assert_close((1 - rule.alpha_B(gap_B, 0.2)) * gap_B, torch.full_like(gap_B, 0.7 * 0.2))


def test_each_kind_of_response_has_its_reference_and_none_a_gradient():
    log_q_B = f64(-1.0, -2.0).requires_grad_()
    gap_B = AdaptiveAlpha().gap_B(log_q_B, f64(-0.9, -2.2), torch.tensor([False, True]))
    alpha_B = AdaptiveAlpha().alpha_B(gap_B, f64(float(gap_B[0]), 2 * float(gap_B[1])).requires_grad_())
    assert not gap_B.requires_grad and not alpha_B.requires_grad
    torch.testing.assert_close(alpha_B, f64(0.1, 0.01))
    assert AdaptiveAlpha().alpha_B(f64(0.2, 0.0, -0.2), -0.1).tolist() == [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha0": 1.0}, r"alpha0=1.0: expected a number in \(0, 1\)"),
        ({"low": 0.0}, "low=0.0"),
        ({"high": float("nan")}, "high=nan"),
        ({"low": 0.3}, "low=0.3, high=0.1: expected low to be at most high"),
    ],
)
def test_bounds_of_alpha_are_checked(options, match):
    with pytest.raises(LimbeckError, match=match):
        AdaptiveAlpha(**options)


# --- beta over training ---


@pytest.mark.parametrize(
    ("beta", "at"),
    [
        (Beta(), {0: 0.5, 99: 0.5}),
        (Beta(shape="constant", start=0.9), {0: 0.9, 99: 0.9}),
        (Beta(shape="code"), {0: 0.5, 25: 0.625, 50: 0.75, 99: 0.75}),
        (Beta(shape="linear"), {0: 0.5, 50: 0.5, 60: 0.6, 75: 0.75, 99: 0.75}),
        (Beta(shape="linear", start=0.2, end=1.0), {0: 0.2, 30: 0.3, 99: 0.99}),
    ],
)
def test_beta_by_hand(beta, at):
    assert {step: pytest.approx(beta.at(step, 100, 10)) for step in at} == at


@pytest.mark.parametrize(
    ("epochs", "at"),
    [
        (1, {0: 1.0, 5: 1.0}),
        (2, {0: 4 / 6, 1: 5 / 6, 2: 1.0, 6: 1.0, 11: 1.0}),
        (3, {0: 0.5, 1: 4 / 6, 3: 1.0, 5: 1.0, 6: 5 / 6, 7: 1.0, 12: 1.0}),
    ],
)
def test_beta_to_the_letter_is_a_sawtooth(epochs, at):
    """Six steps an epoch. In one epoch alone the teacher's responses would never count, which `end` prevents."""
    beta, capped = Beta(shape="sawtooth", end=1.0), Beta(shape="sawtooth")
    assert {step: pytest.approx(beta.at(step, 6 * epochs, 6)) for step in at} == at
    assert {step: pytest.approx(capped.at(step, 6 * epochs, 6)) for step in at} == {
        s: min(b, 0.75) for s, b in at.items()
    }


@pytest.mark.parametrize("shape", ["constant", "code", "linear", "sawtooth"])
def test_beta_never_leaves_its_bounds(shape):
    found = [Beta(shape=shape).at(step, 37, 9) for step in range(40)]
    assert min(found) >= 0.5 and max(found) <= 0.75


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": "cosine"}, "expected one of constant, code, linear, sawtooth"),
        ({"start": -0.1}, "start=-0.1"),
        ({"end": float("nan")}, "end=nan"),
        ({"shape": "linear", "start": 0.8}, "start=0.8, end=0.75: expected start to be at most end"),
    ],
)
def test_options_of_beta_are_checked(options, match):
    with pytest.raises(LimbeckError, match=match):
        Beta(**options)


# --- DPKD ---


def test_dpkd_through_policy_gradient_is_its_own_gradient():
    """Two pairs of different lengths and a row without a partner, weighed as the mean over rows and then pairs does."""
    pair, beta = Pair(bias=True), 0.7
    lengths = torch.tensor([7, 12, 4, 2, 20])
    sequence_N = torch.arange(5).repeat_interleave(lengths)
    pair.label_N.clamp_min_(0)
    partner_B, by_student_B = torch.tensor([1, 0, 3, 2, -1]), torch.tensor([False, True, True, False, True])
    log_q_N, log_p_N = label_logp(pair.hidden, pair.head, pair.signal, pair.label_N)
    advantage_N, loss_B = dpkd_advantage(log_q_N, log_p_N, sequence_N, partner_B, by_student_B, beta)
    fused = pair.fused(
        build_objective("policy_gradient"),
        signal=None,
        weight_N=(1 / (2 * lengths.double()))[sequence_N],
        token_options={"advantage": advantage_N},
    )
    log_q_B, log_p_B = (torch.stack([part.mean() for part in t.split(lengths.tolist())]) for t in naive_logp(pair))
    losses = [
        -torch.nn.functional.logsigmoid(beta * ((log_q_B[t] - log_q_B[s]) - (log_p_B[t] - log_p_B[s])))
        for t, s in ((0, 1), (3, 2))
    ]
    expected = torch.autograd.grad(torch.stack(losses).mean(), pair.parameters)
    for got, grad in zip(torch.autograd.grad(fused.loss, pair.parameters), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss_B, torch.stack([losses[i] for i in (0, 0, 1, 1)] + [f64(0)[0]]).detach())
    assert not advantage_N[sequence_N == 4].any()


def test_dpkd_pulls_the_teachers_response_up_and_pushes_the_other_down():
    sequence_N, nothing_N = torch.tensor([0, 0, 1]), f64(-1, -1, -1)
    advantage_N, loss_B = dpkd_advantage(
        nothing_N, nothing_N, sequence_N, torch.tensor([1, 0]), torch.tensor([False, True]), 0.1
    )
    torch.testing.assert_close(advantage_N, f64(0.05, 0.05, -0.05))
    torch.testing.assert_close(loss_B, f64(math.log(2), math.log(2)))
    # A pair that is far apart already is left alone.
    log_q_N = f64(0, 0, -1e4)
    done_N, done_B = dpkd_advantage(
        log_q_N, nothing_N, sequence_N, torch.tensor([1, 0]), torch.tensor([False, True]), 0.1
    )
    assert done_N.abs().max() < 1e-20 and done_B.abs().max() < 1e-20


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_dpkd_needs_a_positive_beta(beta):
    one = f64(0)
    with pytest.raises(LimbeckError, match=f"dpkd beta={beta}: expected a positive number"):
        dpkd_advantage(one, one, torch.tensor([0]), torch.tensor([-1]), torch.tensor([True]), beta)
