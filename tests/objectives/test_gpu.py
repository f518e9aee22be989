"""The fused loss on a GPU, where there is one: the naive lines again, compiled or not, in float32 and in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from limbeck.objectives import SparseForm, build_objective, fused_distillation_loss
from limbeck.objectives.fused.tiles import GPU_TILE_BYTES
from limbeck.objectives.sequence.distillm2 import label_logp
from limbeck.types import DenseSignal, Head
from tests.objectives.cases import CASES, DEFAULTS, is_teacherless
from tests.objectives.pairs import Pair

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:ab with alpha", "ignore:opd is unbiased", "default::DeprecationWarning"),
]
PAPERS = ("fkl", "rkl", "js", "skl", "srkl", "csd", "ab")


def on_gpu(pair: Pair, dtype: torch.dtype | None = None) -> Pair:
    """The pair with its numbers moved, and rounded where a dtype is given."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device="cuda", dtype=dtype)

    pair.hidden, pair.weight = moved(pair.hidden).requires_grad_(), moved(pair.weight).requires_grad_()
    pair.bias = None if pair.bias is None else moved(pair.bias).requires_grad_()
    head = replace(pair.signal.head, weight_VD=moved(pair.signal.head.weight_VD))
    pair.signal = DenseSignal(hidden_ND=moved(pair.signal.hidden_ND), head=head)
    pair.weight_N, pair.label_N = pair.weight_N.cuda(), pair.label_N.cuda()
    return pair


@pytest.mark.parametrize("objective", CASES.values(), ids=CASES.keys())
def test_equals_naive_for_every_objective(objective):
    pair = on_gpu(Pair(bias=True, softcap=30.0))
    pair.check(pair.fused(objective, 1.7), pair.naive(objective, 1.7))


@pytest.mark.parametrize("name", PAPERS)
def test_compiled_equals_naive_over_several_tiles(name):
    exact, pair = (
        on_gpu(Pair(n=1300, v=2051, d=64, bias=True)),
        on_gpu(Pair(n=1300, v=2051, d=64, bias=True), torch.float32),
    )
    fused = pair.fused(DEFAULTS[name], 2.0, compile="on", tile_bytes=1 << 20)
    value_N = exact.naive(DEFAULTS[name], 2.0)
    torch.testing.assert_close(fused.value_N.double(), value_N.detach(), rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((value_N * exact.weight_N).sum(), exact.parameters)
    for got, true in zip(torch.autograd.grad(fused.loss, pair.parameters), expected, strict=True):
        assert (got - true).norm() / true.norm() < 1e-4


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_is_no_worse_than_naive_bf16(name, bias):
    objective = DEFAULTS[name]
    pair = on_gpu(Pair(n=300, v=500, d=64, bias=bias), torch.bfloat16)
    exact = on_gpu(Pair(n=300, v=500, d=64, bias=bias), torch.bfloat16)
    exact = on_gpu(exact, torch.float64)
    truth_N, naive_N, fused = exact.naive(objective, 2.0), pair.naive(objective, 2.0), pair.fused(objective, 2.0)
    truth = torch.autograd.grad((truth_N * exact.weight_N).sum(), exact.parameters)
    naive = torch.autograd.grad((naive_N * pair.weight_N).sum(), pair.parameters)
    got = torch.autograd.grad(fused.loss, pair.parameters)
    assert fused.value_N.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in got)
    for g, n, t in zip(got, naive, truth, strict=True):
        assert (g - t).norm() <= 1.3 * (n - t).norm() + 1e-3 * t.norm()


@pytest.mark.parametrize("support", ["topk_tail", "topk_renorm"])
def test_sparse_signal_equals_the_cpu(support):
    objective, pair = DEFAULTS["rkl"], Pair(n=600, v=1009)
    form = SparseForm(support=support, k=32, temperatures=(1.0, 2.0))
    signal = form.of(pair.signal, seed=0)
    expected = torch.autograd.grad(pair.fused(objective, signal=signal, support=support).loss, pair.parameters)
    moved = on_gpu(pair)
    signal = form.of(moved.signal, seed=0)
    got = torch.autograd.grad(moved.fused(objective, signal=signal, support=support).loss, moved.parameters)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.cpu(), e)


def test_log_probabilities_of_labels_equal_naive():
    pair = on_gpu(Pair(n=1300, v=2051))
    found = label_logp(pair.hidden, pair.head, pair.signal, pair.label_N.clamp_min(0))
    expected_N = pair.student_logits().log_softmax(-1).gather(-1, pair.label_N.clamp_min(0)[:, None])[:, 0]
    torch.testing.assert_close(found[0].double(), expected_N.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fkl", "csd"])
def test_memory_stays_within_the_tiles(name):
    """16384 tokens by 49152: either model's logits alone would be 1.5 GiB in bfloat16."""
    n, v, d = 16384, 49152, 256
    hidden_ND = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = Head(weight_VD=weight_VD, vocab_size=v)
    signal = DenseSignal(hidden_ND=hidden_ND.detach(), head=replace(head, weight_VD=weight_VD.detach()))
    held = 0
    for _ in range(2):  # Compiling takes some of its own.
        hidden_ND.grad = weight_VD.grad = None
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fused_distillation_loss(hidden_ND, head, signal, build_objective(name)).loss.backward()
    heads = 4 * v * d + 2 * v * d + 6 * n * d
    assert torch.cuda.max_memory_allocated() - held < GPU_TILE_BYTES + heads + (128 << 20)


def test_teacherless_objectives_run():
    pair = on_gpu(Pair())
    for name, objective in DEFAULTS.items():
        if is_teacherless(objective):
            assert torch.isfinite(pair.fused(objective, signal=None).loss), name
