"""The fused loss against the naive lines it replaces: value and every gradient, for every objective and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck.objectives import (
    HiddenPair,
    SparseForm,
    Temperature,
    build_objective,
    fused_distillation_loss,
    logit_tiles,
)
from limbeck.objectives.fused.body import compiled_body, compiler_available
from limbeck.types import DenseSignal, Head, LimbeckError
from tests.objectives.cases import CASES, DEFAULTS
from tests.objectives.pairs import Pair

pytestmark = pytest.mark.filterwarnings("ignore:ab with alpha", "ignore:opd is unbiased")

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale and bias": {"scale": 0.3, "bias": True},
    "scale and softcap": {"softcap": 5.0, "scale": 2.0},
}
needs_compiler = pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler")


@pytest.mark.parametrize("objective", CASES.values(), ids=CASES.keys())
def test_equals_naive_for_every_objective(objective):
    pair = Pair(bias=True)
    pair.check(pair.fused(objective, 1.7), pair.naive(objective, 1.7))


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("head", HEADS)
def test_equals_naive_for_every_head(name, head):
    pair = Pair(**HEADS[head])
    pair.check(pair.fused(DEFAULTS[name], 2.0), pair.naive(DEFAULTS[name], 2.0))


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 507])
@pytest.mark.parametrize("v", [2, 123, 1009])
@pytest.mark.parametrize("tile_bytes", [1, 1 << 20, 1 << 30])
def test_equals_naive_for_odd_shapes_and_any_tile(n, v, tile_bytes):
    pair, objective = Pair(n=n, v=v, d=7), CASES["js(0.1,endpoint)"]
    pair.check(pair.fused(objective, 2.0, tile_bytes=tile_bytes), pair.naive(objective, 2.0))


def test_equals_naive_with_two_temperatures_and_one_a_token():
    pair, objective = Pair(), DEFAULTS["skl"]
    for temperature in (
        Temperature(student=1.0, teacher=2.0, scale="none"),
        Temperature(student=3.0, teacher=1.5, scale="tau"),
        Temperature(loss=torch.linspace(0.5, 3, pair.n)),
    ):
        pair.check(pair.fused(objective, temperature), pair.naive(objective, temperature))


def test_equals_naive_with_options_a_token():
    pair = Pair()
    alpha_N = torch.linspace(0.05, 0.9, pair.n, dtype=torch.float64)
    objective = build_objective("sum", parts=[{"name": "skl", "weight": 0.3}, {"name": "srkl", "alpha": 0.2}])
    for options in ({"alpha": alpha_N}, {"skl.alpha": alpha_N}, {"skl.alpha": alpha_N, "srkl.alpha": 1 - alpha_N}):
        pair.check(pair.fused(objective, token_options=options), pair.naive(objective, token_options=options))
    one_by_one = [pair.naive(build_objective("skl", alpha=float(a)))[i] for i, a in enumerate(alpha_N)]
    fused = pair.fused(DEFAULTS["skl"], token_options={"alpha": alpha_N})
    torch.testing.assert_close(fused.value_N, torch.stack(one_by_one).detach())


def test_a_sum_is_the_sum_of_its_parts():
    pair = Pair()
    parts = [("fkl", 0.5), ("ce", 2.0), ("tv", 1.0), ("fkl", 0.25)]
    objective = build_objective("sum", parts=[{"name": name, "weight": weight} for name, weight in parts])
    fused = pair.fused(objective, 2.0)
    assert list(fused.parts) == ["fkl", "ce", "tv", "fkl.2"]
    pair.check(
        fused,
        0.75 * pair.naive(DEFAULTS["fkl"], 2.0) + 2 * pair.naive(DEFAULTS["ce"]) + pair.naive(DEFAULTS["tv"], 2.0),
    )
    nested = build_objective("sum", parts=[{"name": "sum", "parts": [{"name": "fkl", "weight": 0.5}], "weight": 4}])
    pair.check(pair.fused(nested), 2 * pair.naive(DEFAULTS["fkl"]))


def test_cross_entropy_needs_no_teacher():
    pair = Pair(bias=True)
    expected_N = torch.nn.functional.cross_entropy(pair.student_logits(), pair.label_N, reduction="none")
    pair.check(pair.fused(DEFAULTS["ce"], signal=None), expected_N)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_states_match_beside_logits(kind):
    pair = Pair()
    projection = torch.randn(19, 16, dtype=torch.float64, requires_grad=True)
    hidden_pair = HiddenPair(student_ND=pair.hidden, teacher_NE=pair.signal.hidden_ND, projection_ED=projection)
    objective = build_objective("sum", parts=[{"name": "fkl"}, {"name": "hidden", "kind": kind, "weight": 0.5}])
    fused = pair.fused(objective, hidden_pairs=[hidden_pair])
    assert list(fused.parts) == ["fkl", "hidden"]
    mapped, teacher = pair.hidden @ projection.T, pair.signal.hidden_ND
    distance_N = ((mapped - teacher) ** 2).mean(-1)
    if kind == "cosine":
        distance_N = 1 - torch.cosine_similarity(mapped, teacher, dim=-1)
    value_N = pair.naive(DEFAULTS["fkl"]) + 0.5 * distance_N
    (got,) = torch.autograd.grad(fused.loss, projection, retain_graph=True)
    (expected,) = torch.autograd.grad((value_N * pair.weight_N).sum(), projection, retain_graph=True)
    torch.testing.assert_close(got, expected)
    pair.check(fused, value_N)
    alone = pair.fused(build_objective("hidden", kind=kind), hidden_pairs=[hidden_pair])
    torch.testing.assert_close(alone.value_N, distance_N.detach())


def test_measures():
    pair = Pair()
    measures = pair.fused(DEFAULTS["rkl"], 2.0, measure=True).measures
    p, q = (pair.teacher_logits() / 2).softmax(-1), (pair.student_logits().detach() / 2).softmax(-1)
    torch.testing.assert_close(measures["teacher_entropy"], -(p * p.log()).sum(-1))
    torch.testing.assert_close(measures["student_entropy"], -(q * q.log()).sum(-1))
    torch.testing.assert_close(measures["forward_kl"], pair.naive(DEFAULTS["fkl"]).detach())
    torch.testing.assert_close(measures["acceptance"], 1 - pair.naive(DEFAULTS["tv"]).detach())
    same = pair.teacher_logits().argmax(-1) == pair.student_logits().argmax(-1)
    assert measures["top1_agreement"].tolist() == same.tolist() and same.any() and not same.all()


@pytest.mark.parametrize("frozen", [["weight"], ["hidden"], ["weight", "hidden"], ["weight", "bias", "hidden"]])
def test_only_what_wants_a_gradient_gets_one(frozen):
    pair = Pair(bias=True)
    for name in frozen:
        getattr(pair, name).requires_grad_(False)
    loss = pair.fused(DEFAULTS["fkl"]).loss
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for name in ("weight", "bias", "hidden"):
        assert (getattr(pair, name).grad is None) == (name in frozen)


def test_no_grad_gives_values_alone():
    pair = Pair()
    with torch.no_grad():
        fused = pair.fused(DEFAULTS["rkl"], 2.0)
    assert not fused.loss.requires_grad
    torch.testing.assert_close(fused.value_N, pair.naive(DEFAULTS["rkl"], 2.0).detach())


def test_tied_weights_collect_both_gradients():
    pair, embedded = Pair(n=20), torch.arange(20)
    pair.hidden = 2 * pair.weight[embedded]
    (got,) = torch.autograd.grad(pair.fused(DEFAULTS["fkl"]).loss, pair.weight, retain_graph=True)
    naive = (pair.naive(DEFAULTS["fkl"]) * pair.weight_N).sum()
    (expected,) = torch.autograd.grad(naive, pair.weight)
    torch.testing.assert_close(got, expected)


def test_no_tokens_give_zero_with_gradients():
    pair = Pair(n=0)
    fused = pair.fused(DEFAULTS["fkl"])
    fused.loss.backward()
    assert fused.loss == 0 and fused.value_N.shape == (0,)
    assert pair.weight.grad is not None and not pair.weight.grad.any()


def test_a_token_of_weight_zero_does_not_count():
    pair = Pair()
    pair.weight_N[3] = 0.0
    with torch.no_grad():
        pair.signal.hidden_ND[3] = 1e4
    fused = pair.fused(DEFAULTS["ab"])
    (grad,) = torch.autograd.grad(fused.loss, pair.hidden)
    assert fused.loss.isfinite() and not grad[3].any()


def test_backward_twice_gives_the_same():
    pair = Pair()
    loss = pair.fused(DEFAULTS["js"]).loss
    first = torch.autograd.grad(loss, pair.parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, pair.parameters), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name",
    ["fkl", "rkl", "js", "skl", "srkl", "ab", "tad", "lskd", "ce", "policy_gradient", "jeffreys", "symmetric_kl"],
)
def test_gradcheck(name):
    pair = Pair(n=3, v=5, d=3, bias=True, scale=0.7, softcap=4.0)

    def loss(hidden, weight, bias):
        head = Head(weight_VD=weight, bias_V=bias, scale=0.7, softcap=4.0, vocab_size=5)
        return fused_distillation_loss(
            hidden, head, pair.signal, DEFAULTS[name], temperature=Temperature(loss=1.3), label_N=pair.label_N
        ).loss

    assert torch.autograd.gradcheck(loss, pair.parameters)


def compiled_equals_plain(pair, objective, **options):
    plain, compiled = (pair.fused(objective, 2.0, compile=option, **options) for option in ("off", "on"))
    torch.testing.assert_close(compiled.value_N, plain.value_N, rtol=1e-4, atol=1e-5)
    for name, measure in plain.measures.items():
        torch.testing.assert_close(compiled.measures[name], measure, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(f.loss, pair.parameters) for f in (compiled, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


@needs_compiler
@pytest.mark.parametrize("name", ["rkl", "skl", "srkl", "js", "csd", "tad", "opd", "policy_gradient", "sum"])
def test_compiled_and_plain_agree(name):
    pair = Pair(dtype=torch.float32, n=75, v=3001, bias=True, softcap=30.0)
    compiled_equals_plain(pair, DEFAULTS[name])


@needs_compiler
def test_compiled_and_plain_agree_on_distillm2s_own_half_with_an_alpha_for_each_token():
    pair = Pair(dtype=torch.float32, n=75, v=3001, bias=True)
    detached = build_objective("srkl", detach_mixture=True)
    compiled_equals_plain(pair, detached, token_options={"alpha": torch.linspace(0.01, 0.1, 75)}, measure=True)


@needs_compiler
@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm", "sampled"])
@pytest.mark.filterwarnings("ignore:topk_renorm at temperature")
def test_compiled_and_plain_agree_on_sparse_signals_with_measures_and_options(support):
    pair = Pair(dtype=torch.float32, n=75, v=3001, bias=True)
    signal = SparseForm(support=support, k=9, temperatures=(1.0, 2.0)).of(pair.signal, seed=3)
    if support == "sampled":
        return compiled_equals_plain(pair, DEFAULTS["fkl"], signal=signal)
    options = {"token_options": {"alpha": torch.linspace(0.05, 0.9, 75)}, "measure": True}
    return compiled_equals_plain(pair, DEFAULTS["skl"], signal=signal, support=support, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own imports
@pytest.mark.parametrize("failures", [1, 2])
def test_a_compiler_that_fails_is_asked_once_more_and_then_named(failures, monkeypatch):
    from torch._inductor import compile_fx
    from torch._inductor.exc import CppCompileError, InductorError

    told = "body.h:1: warning: overflow\nbody.cpp:3: error: killed by a signal\n" + 300 * "more\n"
    calls = []

    def fails(graph, examples):
        calls.append(graph)
        if len(calls) <= failures:
            raise InductorError(CppCompileError(["g++"], told), None)
        return lambda *tensors: list(graph(*tensors))

    monkeypatch.setattr(compile_fx, "compile_fx", fails)
    layout = (("x", (2, 3), torch.float64, torch.device("cpu")),)

    def build():
        return compiled_body(lambda block, kept: 2 * block["x"], layout)([torch.ones(2, 3, dtype=torch.float64)])

    if failures == 1:
        assert build().eq(2).all()
    else:
        with pytest.raises(LimbeckError, match=r"the loss \(body.cpp:3: error: killed by a signal\): mend"):
            build()
    assert len(calls) == 2


def test_logit_tiles_cover_every_token_once():
    pair = Pair(n=301, scale=0.5, softcap=3.0)
    student_NV, teacher_NV = pair.student_logits().detach(), pair.teacher_logits()
    seen = 0
    for tokens, s, t in logit_tiles(pair.hidden, pair.head, pair.signal, tile_bytes=1):
        assert tokens.start == seen and not s.requires_grad
        seen = tokens.stop
        torch.testing.assert_close(s, student_NV[tokens])
        torch.testing.assert_close(t, teacher_NV[tokens])
    assert seen == 301


def test_bad_input_is_refused():
    pair = Pair()
    signal, fkl = pair.signal, DEFAULTS["fkl"]
    head = signal.head
    cases: list[tuple[str, dict[str, Any]]] = [
        (
            "vocab_size",
            {"signal": DenseSignal(hidden_ND=signal.hidden_ND, head=Head(weight_VD=head.weight_VD, vocab_size=38))},
        ),
        ("same order", {"signal": DenseSignal(hidden_ND=signal.hidden_ND[1:], head=head)}),
        ("do not fit", {"signal": DenseSignal(hidden_ND=signal.hidden_ND[:, 1:], head=head)}),
        ("reads a teacher", {"signal": None}),
        ("one per token", {"weight_N": pair.weight_N[1:]}),
        ("tile_bytes", {"tile_bytes": 0}),
        ("auto, on or off", {"compile": "yes"}),
        ("unknown to this objective", {"token_options": {"alpha": pair.weight_N}}),
        ("topk_signal", {"support": "topk_tail"}),
    ]
    for match, options in cases:
        with pytest.raises(LimbeckError, match=match):
            pair.fused(fkl, **options)
    with pytest.raises(LimbeckError, match=r"skl alpha=2.0: expected a number in \(0, 1\)"):
        pair.fused(DEFAULTS["skl"], token_options={"alpha": 2 * torch.ones(pair.n)})
    with pytest.raises(LimbeckError, match="reads labels"):
        pair.fused(DEFAULTS["ce"], label_N=None)
    with pytest.raises(LimbeckError, match="is no token"):
        pair.fused(DEFAULTS["ce"], label_N=pair.label_N + 37)
    with pytest.raises(LimbeckError, match="give a projection"):
        pair.fused(build_objective("hidden"))
    with pytest.raises(LimbeckError, match="float32"):
        fused_distillation_loss(pair.hidden.float(), pair.head, signal, fkl)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_token_of_weight_zero_may_hold_anything(side, broken):
    pair, weight_N = Pair(dtype=torch.float32), torch.full((Pair().n,), 0.1)
    weight_N[3] = 0.0
    clean = pair.fused(DEFAULTS["csd"], weight_N=weight_N)
    expected = torch.autograd.grad(clean.loss, pair.parameters)
    states_ND = pair.hidden if side == "student" else pair.signal.hidden_ND
    with torch.no_grad():
        states_ND[3] = broken
    fused = pair.fused(DEFAULTS["csd"], weight_N=weight_N)
    torch.testing.assert_close(fused.loss, clean.loss)
    for got, grad in zip(torch.autograd.grad(fused.loss, pair.parameters), expected, strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize(
    ("name", "options", "token_options", "says"),
    [
        ("js", {"form": "normalized"}, {"beta": 1.0}, "js beta=1.0"),
        ("js", {}, {"beta": 0.0}, "js beta=0.0"),
        ("srkl", {}, {"alpha": 1.0}, "srkl alpha=1.0"),
        ("taid", {}, {"progress": 0.0}, "taid progress=0.0"),
        ("tad", {}, {"tail_weight": float("nan")}, "tad tail_weight=nan"),
        ("eopd", {"base": "skl"}, {"eopd.alpha": 0.2}, "'eopd.alpha' is unknown.*skl.alpha"),
        ("eopd", {"base": "skl"}, {"alpha": 0.0}, "skl alpha=0.0"),
    ],
)
def test_an_option_a_token_has_the_bounds_of_the_option(name, options, token_options, says):
    pair = Pair(n=4)
    given = {option: torch.full((4,), value, dtype=torch.float64) for option, value in token_options.items()}
    with pytest.raises(LimbeckError, match=says):
        pair.fused(build_objective(name, **options), token_options=given)


def test_an_option_a_token_reaches_an_objective_inside_another():
    pair, alpha_N = Pair(), torch.linspace(0.05, 0.9, Pair().n, dtype=torch.float64)
    objective = build_objective("eopd", base="skl", threshold=1e9)
    inside = pair.fused(objective, token_options={"skl.alpha": alpha_N})
    pair.check(inside, pair.naive(DEFAULTS["skl"], token_options={"alpha": alpha_N}))
