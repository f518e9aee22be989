"""Half precision and memory: no worse than the naive lines in the same dtype, and never N x V numbers at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from limbeck.objectives import build_objective, fused_distillation_loss, token_values
from limbeck.types import DenseSignal, Head
from tests.objectives.cases import DEFAULTS
from tests.objectives.pairs import Pair

pytestmark = pytest.mark.filterwarnings("ignore:ab with alpha", "ignore:opd is unbiased")


def half(pair: Pair, dtype: torch.dtype) -> Pair:
    """The same pair with its numbers rounded to a half precision."""
    rounded = Pair(n=pair.n, v=pair.v, d=pair.hidden.shape[1])
    rounded.hidden, rounded.weight = (t.detach().to(dtype).requires_grad_() for t in (pair.hidden, pair.weight))
    head = Head(weight_VD=pair.signal.head.weight_VD.to(dtype), vocab_size=pair.v)
    rounded.signal = DenseSignal(hidden_ND=pair.signal.hidden_ND.to(dtype), head=head)
    return rounded


@pytest.mark.parametrize("name", DEFAULTS)
def test_bf16_is_no_worse_than_naive_bf16(name):
    pair = half(Pair(n=300, v=500, d=64), torch.bfloat16)
    exact = Pair(n=300, v=500, d=64)
    exact.hidden, exact.weight = (t.detach().double().requires_grad_() for t in (pair.hidden, pair.weight))
    exact.signal = DenseSignal(
        hidden_ND=pair.signal.hidden_ND.double(),
        head=Head(weight_VD=pair.signal.head.weight_VD.double(), vocab_size=500),
    )
    objective = DEFAULTS[name]
    truth_N, naive_N, fused = exact.naive(objective, 2.0), pair.naive(objective, 2.0), pair.fused(objective, 2.0)
    weight_N = pair.weight_N
    truth = torch.autograd.grad((truth_N * weight_N).sum(), exact.parameters)
    naive = torch.autograd.grad((naive_N * weight_N).sum(), pair.parameters)
    got = torch.autograd.grad(fused.loss, pair.parameters)
    assert fused.value_N.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in got)

    def error(x, true):
        return (x.double() - true).abs()

    assert (error(fused.value_N, truth_N) <= error(naive_N, truth_N) + 1e-3 * truth_N.abs().max()).all()
    for g, n, t in zip(got, naive, truth, strict=True):
        assert (error(g, t) <= error(n, t) + 2e-2 * t.abs().max()).all()
        assert error(g, t).norm() <= 1.3 * error(n, t).norm() + 1e-3 * t.norm()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_js_in_bf16_is_not_negative(beta):
    pair = half(Pair(n=300, v=500), torch.bfloat16)
    objective = build_objective("js", beta=beta)
    student_NV, teacher_NV = pair.student_logits(), pair.teacher_logits()
    assert token_values(objective, student_NV, teacher_NV).min() >= -1e-7
    # A student in float32 beside a teacher in bfloat16, and a student that equals its teacher.
    assert token_values(objective, student_NV.float(), teacher_NV).min() >= -1e-7
    assert token_values(objective, teacher_NV.float(), teacher_NV).min() >= -1e-7
    assert pair.fused(objective).value_N.min() >= -1e-7


def test_autocast_runs_the_products_in_bf16():
    pair = Pair(dtype=torch.float32, n=60, v=200)
    exact = torch.autograd.grad(pair.fused(DEFAULTS["rkl"], 2.0).loss, pair.parameters)
    with torch.autocast("cpu", torch.bfloat16):
        fused = pair.fused(DEFAULTS["rkl"], 2.0)
    got = torch.autograd.grad(fused.loss, pair.parameters)
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == torch.float32
        assert 1e-5 < (g - e).norm() / e.norm() < 2e-2


def test_half_precision_under_a_loss_scaler_does_not_underflow():
    pair = half(Pair(n=200, v=2000), torch.float16)
    weight_N = torch.full((200,), 1e-7, dtype=torch.float32)
    fused = fused_distillation_loss(pair.hidden, pair.head, pair.signal, DEFAULTS["fkl"], weight_N=weight_N)
    (grad,) = torch.autograd.grad(fused.loss * 2.0**16, pair.hidden)
    assert grad.dtype == torch.float16 and (grad != 0).float().mean() > 0.9


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("name", DEFAULTS)
def test_nothing_of_size_n_by_v_appears(name):
    pair = Pair(dtype=torch.float32, n=1600, v=1501, d=8)
    if name == "fkl":
        with Largest() as watch:
            pair.naive(DEFAULTS[name], 2.0)
        assert watch.numel >= pair.n * pair.v, "the watch sees the naive logits"
    with Largest() as watch:
        pair.fused(DEFAULTS[name], 2.0, tile_bytes=1 << 20).loss.backward()
    # The least a tile can be is one block, 256 tokens here.
    assert watch.numel <= 256 * pair.v < pair.n * pair.v / 6


PEAK = """
import resource, sys, torch
from limbeck.types import DenseSignal, Head
from limbeck.objectives import build_objective, fused_distillation_loss
torch.manual_seed(0)
n, v, d = int(sys.argv[1]), 20000, 8
head = Head(weight_VD=torch.randn(v, d, requires_grad=True), vocab_size=v)
hidden = torch.randn(n, d, requires_grad=True)
signal = DenseSignal(hidden_ND=torch.randn(n, d), head=Head(weight_VD=torch.randn(v, d), vocab_size=v))
def step(k):
    fused_distillation_loss(hidden[:k], head, DenseSignal(hidden_ND=signal.hidden_ND[:k], head=signal.head),
                            build_objective("js"), tile_bytes=16 << 20).loss.backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_does_not_grow_with_the_logits():
    done = subprocess.run([sys.executable, "-c", PEAK, "3000"], capture_output=True, text=True, check=True)
    logits_kib = 3000 * 20000 * 4 // 1024
    assert int(done.stdout) < logits_kib / 3
