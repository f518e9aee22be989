"""Sparse signals: buckets, renormalised top-k and samples, their exactness in temperature, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limbeck.objectives import SparseForm, Temperature, build_objective, sampled_signal, token_values, topk_signal
from limbeck.objectives.base import Rows
from limbeck.objectives.support import restrict
from limbeck.types import LimbeckError, SampledSignal
from tests.objectives.cases import CASES, DEFAULTS
from tests.objectives.pairs import Pair

pytestmark = pytest.mark.filterwarnings("ignore:ab with alpha", "ignore:topk_renorm at temperature")

GRID = (1.0, 1.5, 2.0, 4.0)
TAIL = {name: o for name, o in CASES.items() if "topk_tail" in o.supports and "teacher" in o.reads}
RENORM = {name: o for name, o in CASES.items() if "topk_renorm" in o.supports and "teacher" in o.reads}


def bucket(logits_NV: Tensor, ids_NK: Tensor, tau: float) -> Tensor:
    """Log-probabilities of the kept tokens and of all others together, as logits."""
    log_p_NV = (logits_NV / tau).log_softmax(-1)
    rest_N1 = log_p_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return tau * torch.cat([log_p_NV.gather(-1, ids_NK), rest_N1], dim=-1)


@pytest.mark.parametrize("name", TAIL)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_tail_equals_the_naive_bucket(name, tau):
    pair = Pair(bias=True)
    signal = topk_signal(pair.teacher_logits(), 6, GRID)
    student_NV, teacher_NV = (bucket(t, signal.ids_NK, tau) for t in (pair.student_logits(), pair.teacher_logits()))
    expected_N = token_values(TAIL[name], student_NV, teacher_NV, temperature=tau)
    pair.check(pair.fused(TAIL[name], tau, signal=signal), expected_N, rtol=1e-7, atol=1e-9)


HEADS = {"scale and bias": {"scale": 0.3, "bias": True}, "softcap": {"softcap": 5.0, "scale": 2.0}}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("n", [1, 255, 300])
@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm", "sampled"])
def test_every_head_and_odd_shapes(head, n, support):
    pair = Pair(n=n, **HEADS[head])
    signal = SparseForm(support=support, k=5, temperatures=(2.0,)).of(pair.signal, seed=1)
    objective, student_NV, teacher_NV = DEFAULTS["fkl"], pair.student_logits(), pair.teacher_logits()
    if isinstance(signal, SampledSignal):
        log_q_NV, log_p_NV = (student_NV / 2).log_softmax(-1), (teacher_NV / 2).log_softmax(-1)
        ratio_NK = (log_p_NV - teacher_NV.log_softmax(-1)).gather(-1, signal.ids_NK).exp()
        share_NK = signal.count_NK * ratio_NK / signal.count_NK.sum(-1, keepdim=True)
        expected_N = 4 * (share_NK * (log_p_NV - log_q_NV).gather(-1, signal.ids_NK)).sum(-1)
    elif support == "topk_tail":
        rows = [bucket(t, signal.ids_NK, 2.0) for t in (student_NV, teacher_NV)]
        expected_N = token_values(objective, *rows, temperature=2.0)
    else:
        rows = [t.gather(-1, signal.ids_NK) for t in (student_NV, teacher_NV)]
        expected_N = token_values(objective, *rows, temperature=2.0)
    chosen = None if support == "sampled" else support
    fused = pair.fused(objective, 2.0, signal=signal, support=chosen, tile_bytes=1 << 14)
    pair.check(fused, expected_N, rtol=1e-7, atol=1e-9)


def test_what_the_kept_tokens_hold_is_measured():
    pair = Pair()
    signal = SparseForm(support="topk_tail", k=6, temperatures=(2.0,)).of(pair.signal, seed=0)
    measures = pair.fused(DEFAULTS["fkl"], 2.0, signal=signal, measure=True).measures
    for side, logits_NV in (("student", pair.student_logits()), ("teacher", pair.teacher_logits())):
        kept_N = (logits_NV / 2).softmax(-1).gather(-1, signal.ids_NK).sum(-1)
        torch.testing.assert_close(measures[f"{side}_kept"], kept_N.detach())


@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm"])
@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
@pytest.mark.filterwarnings("ignore:topk_renorm at temperature")
def test_the_measured_kl_is_that_at_temperature_1_whatever_the_losses_is(support, tau):
    pair = Pair()
    signal = topk_signal(pair.teacher_logits(), 6, (2.0, 4.0))
    rows = [pair.student_logits().detach(), pair.teacher_logits()]
    rows = [bucket(t, signal.ids_NK, 1.0) if support == "topk_tail" else t.gather(-1, signal.ids_NK) for t in rows]
    measures = pair.fused(DEFAULTS["rkl"], tau, signal=signal, support=support, measure=True).measures
    torch.testing.assert_close(measures["forward_kl"], token_values(DEFAULTS["fkl"], *rows))


@pytest.mark.parametrize("name", RENORM)
@pytest.mark.parametrize("tau", [1.0, 3.3])
def test_renormalised_equals_the_naive_rows(name, tau):
    pair = Pair()
    signal = topk_signal(pair.teacher_logits(), 6)
    rows = [t.gather(-1, signal.ids_NK) for t in (pair.student_logits(), pair.teacher_logits())]
    expected_N = token_values(RENORM[name], *rows, temperature=tau)
    pair.check(pair.fused(RENORM[name], tau, signal=signal, support="topk_renorm"), expected_N)


@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm"])
@pytest.mark.parametrize("name", ["fkl", "rkl", "js", "tv"])
def test_keeping_every_token_is_the_full_loss(support, name):
    pair = Pair()
    signal = topk_signal(pair.teacher_logits(), pair.v, GRID)
    fused = pair.fused(DEFAULTS[name], 2.0, signal=signal, support=support)
    pair.check(fused, pair.naive(DEFAULTS[name], 2.0), rtol=1e-8)


@pytest.mark.parametrize("tau", GRID)
@pytest.mark.parametrize("name", ["fkl", "rkl"])
def test_bucket_is_between_zero_and_the_full_kl(name, tau):
    pair = Pair(n=200)
    full_N = pair.naive(DEFAULTS[name], tau).detach()
    previous_N = torch.zeros_like(full_N)
    for k in (1, 3, 10, 30):
        value_N = pair.fused(DEFAULTS[name], tau, signal=topk_signal(pair.teacher_logits(), k, GRID)).value_N
        assert (value_N >= previous_N - 1e-9).all(), "a finer partition loses nothing"
        previous_N = value_N
    assert (previous_N <= full_N + 1e-9).all()


def test_chain_rule_of_the_bucket():
    """KL = KL(mass split) + P KL(kept) + (1 - P) KL(rest); renormalising keeps the middle term alone."""
    pair = Pair()
    signal = topk_signal(pair.teacher_logits(), 5)
    log_p, log_q = pair.teacher_logits().log_softmax(-1), pair.student_logits().detach().log_softmax(-1)
    kept = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, signal.ids_NK, True)
    masses = [[torch.where(part, t.exp(), 0.0).sum(-1) for part in (kept, ~kept)] for t in (log_p, log_q)]
    split_N = sum(p * (p / q).log() for p, q in zip(*masses, strict=True))
    kept_N = pair.fused(DEFAULTS["fkl"], signal=signal, support="topk_renorm").value_N
    rest_N = torch.where(~kept, log_p.exp() * (log_p - log_q), 0.0).sum(-1) / masses[0][1]
    rest_N = rest_N - (masses[0][1] / masses[1][1]).log()
    full_N = pair.naive(DEFAULTS["fkl"]).detach()
    torch.testing.assert_close(split_N + masses[0][0] * kept_N + masses[0][1] * rest_N, full_N)
    torch.testing.assert_close(pair.fused(DEFAULTS["fkl"], signal=signal).value_N, split_N + masses[0][0] * kept_N)


def test_raw_top_k_would_be_negative_and_push_the_tail_away():
    """Why it is not offered: the value dips below zero and the minimiser has no tail."""
    pair = Pair(n=50)
    signal = topk_signal(pair.teacher_logits(), 5)
    # A student surer of the kept tokens than the teacher is.
    student = (1.3 * pair.teacher_logits()).requires_grad_()
    log_p, log_q = signal.logp_NK, student.log_softmax(-1).gather(-1, signal.ids_NK)
    raw_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    (grad,) = torch.autograd.grad(raw_N.sum(), student)
    kept_mass = log_p.exp().sum(-1, keepdim=True)
    expected = student.softmax(-1) * kept_mass
    expected = expected - torch.zeros_like(expected).scatter(-1, signal.ids_NK, log_p.exp())
    torch.testing.assert_close(grad, expected)
    rows = [bucket(t, signal.ids_NK, 1.0) for t in (student, pair.teacher_logits())]
    assert raw_N.min() < 0 <= token_values(DEFAULTS["fkl"], *rows).min()


def test_a_teacher_without_a_tail_keeps_reverse_kl_finite():
    """In float32 the mass outside the top k of a confident teacher rounds to zero; reverse KL must not take its log."""
    pair = Pair(dtype=torch.float32)
    teacher = pair.teacher_logits()
    teacher[:, 3] += 60.0
    fused = pair.fused(DEFAULTS["rkl"], signal=topk_signal(teacher, 4))
    (grad,) = torch.autograd.grad(fused.loss, pair.hidden)
    assert fused.value_N.max() < 100 and grad.abs().max() < 1000


def test_sample_is_unbiased_in_value_and_gradient():
    pair = Pair(n=4, v=15)
    teacher, tau = pair.teacher_logits(), 2.0
    g = torch.Generator().manual_seed(0)
    values, grads = [], []
    for _ in range(800):
        fused = pair.fused(DEFAULTS["fkl"], tau, signal=sampled_signal(teacher, 12, GRID, generator=g))
        values.append(fused.value_N)
        grads.append(torch.autograd.grad(fused.loss, pair.hidden)[0])
    expected_N = pair.naive(DEFAULTS["fkl"], tau)
    (expected_ND,) = torch.autograd.grad((expected_N * pair.weight_N).sum(), pair.hidden)
    for draws, expected in ((torch.stack(values), expected_N.detach()), (torch.stack(grads), expected_ND)):
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - expected).abs() < 5 * error).all()


def test_sample_with_a_proposal_of_its_own_weighs_by_importance():
    pair = Pair(n=1, v=9)
    log_p = pair.teacher_logits().log_softmax(-1)
    # Every token once, as a proposal that is uniform would on average: the estimate is the KL itself.
    signal = SampledSignal(
        ids_NK=torch.arange(9)[None],
        count_NK=torch.ones(1, 9),
        logp_NK=log_p,
        log_proposal_NK=torch.full((1, 9), -torch.tensor(9.0).log().item(), dtype=torch.float64),
        temperatures=(),
        log_z_NG=torch.zeros(1, 0, dtype=torch.float64),
    )
    pair.check(pair.fused(DEFAULTS["fkl"], signal=signal), pair.naive(DEFAULTS["fkl"]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tau", GRID)
def test_cache_is_exact_at_every_temperature_of_its_grid(tau):
    pair = Pair()
    signal = topk_signal(pair.teacher_logits(), 4, GRID[1:])
    ids = signal.ids_NK
    student, teacher = (bucket(t, ids, tau) for t in (pair.student_logits().detach(), pair.teacher_logits()))
    expected_N = token_values(DEFAULTS["fkl"], student, teacher, temperature=tau)
    torch.testing.assert_close(pair.fused(DEFAULTS["fkl"], tau, signal=signal).value_N, expected_N)
    taus = torch.tensor([GRID[i % 4] for i in range(pair.n)], dtype=torch.float64)
    by_token = pair.fused(DEFAULTS["fkl"], Temperature(loss=taus), signal=signal).value_N
    torch.testing.assert_close(by_token[taus == tau], expected_N[taus == tau])


def test_labels_see_the_whole_row_beside_a_sparse_teacher():
    pair = Pair()
    both = build_objective("sum", parts=[{"name": "fkl"}, {"name": "ce", "weight": 0.5}])
    signal = topk_signal(pair.teacher_logits(), 4)
    student, teacher = (bucket(t, signal.ids_NK, 1.0) for t in (pair.student_logits(), pair.teacher_logits()))
    expected_N = token_values(DEFAULTS["fkl"], student, teacher) + 0.5 * pair.naive(DEFAULTS["ce"])
    pair.check(pair.fused(both, signal=signal), expected_N, rtol=1e-8)


@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm"])
def test_an_objective_that_reads_labels_alone_has_no_support(support):
    pair = Pair()
    signal = topk_signal(pair.teacher_logits(), 4)
    pair.check(pair.fused(DEFAULTS["ce"], signal=signal, support=support), pair.naive(DEFAULTS["ce"]), rtol=1e-8)


def test_an_impossible_rest_gives_no_nan():
    student = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    signal = topk_signal(torch.tensor([[2.0, 1.0, -50.0, -60.0]]), 2)
    one = torch.ones(1, 1)
    rows = Rows(student_logits_NK=student, teacher_logits_NK=student, student_tau_N1=one, teacher_tau_N1=one)
    columns = {"ids": signal.ids_NK, "logp": signal.logp_NK, "log_z": torch.zeros(1, 1)}
    seen, spread = restrict("topk_tail", rows, columns)
    value_N, grad_NK = DEFAULTS["rkl"].value_and_grad(seen)
    assert value_N.isfinite().all() and spread(grad_NK).isfinite().all()


def test_biased_and_impossible_combinations_are_refused():
    pair = Pair()
    topk, sample = topk_signal(pair.teacher_logits(), 4, (2.0,)), sampled_signal(pair.teacher_logits(), 5)
    for match, objective, tau, options in [
        ("capture it with that temperature", "fkl", 3.0, {"signal": topk}),
        ("capture it with that temperature", "fkl", 2.0, {"signal": sample}),
        ("not defined on support 'sampled'", "rkl", 1.0, {"signal": sample}),
        ("not defined on support 'sampled'", "js", 1.0, {"signal": sample}),
        ("not defined on support 'topk_tail'", "csd", 1.0, {"signal": topk}),
        ("not defined on support 'topk_tail'", "tad", 1.0, {"signal": topk}),
        ("it gives sampled", "fkl", 1.0, {"signal": sample, "support": "topk_tail"}),
        ("measure=True", "fkl", 1.0, {"signal": sample, "measure": True}),
        ("same positions", "fkl", 1.0, {"signal": topk_signal(pair.teacher_logits()[1:], 4)}),
        ("one vocabulary", "fkl", 1.0, {"signal": replace(topk, ids_NK=topk.ids_NK + pair.v)}),
        (r"expected \(N, K\)", "fkl", 1.0, {"signal": replace(topk, logp_NK=topk.logp_NK[:, 1:])}),
    ]:
        with pytest.raises(LimbeckError, match=match):
            pair.fused(DEFAULTS[objective], tau, **options)
    for k in (0, 38):
        with pytest.raises(LimbeckError, match="expected 1 to"):
            topk_signal(pair.teacher_logits(), k)


@pytest.mark.filterwarnings("error")
def test_renormalising_at_a_high_temperature_warns():
    pair = Pair()
    signal = topk_signal(pair.teacher_logits(), 4)
    pair.fused(DEFAULTS["fkl"], signal=signal, support="topk_renorm")
    with pytest.warns(UserWarning, match="mass outside the top k"):
        pair.fused(DEFAULTS["fkl"], 2.0, signal=signal, support="topk_renorm")
