"""The hunt for NaN: extreme logits, one-hot teachers, impossible tokens, zero probabilities, in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.objectives import SparseForm, Temperature, fused_distillation_loss
from limbeck.objectives.divergences import AlphaBeta
from limbeck.objectives.temperature import scaled
from limbeck.types import DenseSignal, Head, Signal
from tests.objectives.cases import CASES, DEFAULTS, make_rows

# Squares of 1e30 are infinite in float32: a value may be infinite, a gradient and a NaN may not.
finite = st.floats(-(2.0**50), 2.0**50, width=32)
usual = st.floats(-60, 60, width=32)
logit = st.one_of(usual, usual, finite, st.sampled_from([0.0, -0.0, 1e4, -1e4, 88.0, -104.0]))
V = 6


def rows_of(draw, impossible: bool):
    entry = st.one_of(logit, st.just(-float("inf"))) if impossible else logit
    row = st.lists(entry, min_size=V, max_size=V).filter(lambda r: any(x > -1e30 for x in r))
    return draw(row)


@st.composite
def pairs(draw):
    impossible = draw(st.booleans())
    student, teacher = rows_of(draw, impossible), rows_of(draw, impossible)
    # At least one token both models can say: the others have no ground to be compared on.
    common = draw(st.integers(0, V - 1))
    student[common] = student[common] if student[common] > -1e30 else 0.0
    teacher[common] = teacher[common] if teacher[common] > -1e30 else 0.0
    return student, teacher, common


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150, deadline=None)
@given(pair=pairs(), tau=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_no_finite_input_gives_nan(dtype, pair, tau):
    student, teacher, label = pair
    for name, objective in CASES.items():
        rows = make_rows(
            torch.tensor([student], dtype=dtype), torch.tensor([teacher], dtype=dtype), torch.tensor([label]), tau
        )
        value_N, grad_NV = scaled(objective, rows)
        assert not value_N.isnan().any(), (name, student, teacher)
        assert grad_NV.isfinite().all(), (name, student, teacher)


@settings(max_examples=60, deadline=None)
@given(
    student=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=2, max_size=2),
    teacher=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=2, max_size=2),
    tau=st.sampled_from([1.0, 2.0]),
    support=st.sampled_from(["full", "topk_tail", "topk_renorm", "sampled"]),
)
@pytest.mark.filterwarnings("ignore:topk_renorm at temperature")
def test_no_finite_hidden_state_gives_nan_through_the_fused_loss(student, teacher, tau, support):
    """The whole way: projection, support, objective, gradients of hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(V, 3, generator=generator).requires_grad_(i == 0) for i in range(2)]
    heads = [Head(weight_VD=w, vocab_size=V) for w in weights]
    hidden_ND = torch.tensor(student).requires_grad_()
    signal: Signal = DenseSignal(hidden_ND=torch.tensor(teacher), head=heads[1])
    if support != "full":
        signal = SparseForm(support=support, k=3, temperatures=(1.0, 2.0)).of(signal, seed=0)
    for name in ("fkl",) if support == "sampled" else ("fkl", "rkl", "js", "skl", "tv"):
        fused = fused_distillation_loss(
            hidden_ND, heads[0], signal, DEFAULTS[name], temperature=Temperature(loss=tau), support=support
        )
        assert not fused.value_N.isnan().any(), name
        for grad in torch.autograd.grad(fused.loss, (hidden_ND, weights[0])):
            assert not grad.isnan().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_teacher(dtype):
    teacher = torch.full((1, V), -1e9, dtype=dtype)
    teacher[0, 2] = 0.0
    student = torch.randn(1, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, objective in CASES.items():
        value_N, grad_NV = scaled(objective, make_rows(student, teacher, torch.tensor([2])))
        assert value_N.isfinite().all() and grad_NV.isfinite().all(), name
    value_N, grad_NV = scaled(CASES["fkl()"], make_rows(student, teacher))
    torch.testing.assert_close(value_N, -student.log_softmax(-1)[:, 2])
    torch.testing.assert_close(grad_NV, student.softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_that_have_no_token_in_common(dtype):
    """No pair of scores can be compared: nothing to learn, and nothing broken."""
    student = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]], dtype=dtype)
    teacher = torch.tensor([[-torch.inf, -torch.inf, 0.5, 1.0]], dtype=dtype)
    for name, objective in CASES.items():
        value_N, grad_NV = scaled(objective, make_rows(student, teacher, torch.tensor([0])))
        assert not value_N.isnan().any() and grad_NV.isfinite().all(), name
        if objective.name in ("csd", "dld"):
            assert value_N.item() == 0 and not grad_NV.any(), name


@pytest.mark.parametrize(
    "powers", [(1e-9, 0.7), (1e-6, 1e-6), (1 - 1e-9, 1e-9), (0.3 - 0.1 - 0.2, 0.5), (0.4, -0.4 + 1e-8)]
)
def test_alpha_beta_near_its_limits_keeps_its_value_in_float32(powers):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 16, 300, generator=generator, dtype=torch.float64)
    alpha, beta = (0.0 if abs(p) < 1e-3 else p for p in powers)
    limit = AlphaBeta(alpha=alpha, beta=-alpha if abs(alpha + beta) < 1e-3 else beta)
    expected = scaled(limit, make_rows(student, teacher))
    got = scaled(AlphaBeta(alpha=powers[0], beta=powers[1]), make_rows(student.float(), teacher.float()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=1e-6)
