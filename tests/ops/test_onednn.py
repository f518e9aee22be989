"""Linear layers through oneDNN: the same numbers as F.linear, and everything else passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.ops import onednn

PREFERRED = onednn.preferred
needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def _whoever_made_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "preferred", onednn.available)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = {
    "1-D": lambda: drawn(24),
    "2-D": lambda: drawn(7, 24),
    "3-D": lambda: drawn(3, 5, 24),
    "4-D": lambda: drawn(2, 3, 5, 24),
    "transposed": lambda: drawn(24, 7).t(),
    "every other": lambda: drawn(3, 10, 24)[:, ::2],
    "columns": lambda: drawn(7, 48)[:, ::2],
    "permuted": lambda: drawn(5, 24, 3).permute(2, 0, 1),
    "broadcast": lambda: drawn(1, 24).expand(6, 24),
    "one row": lambda: drawn(1, 24),
}
WEIGHTS = {"plain": lambda: drawn(11, 24, seed=1), "transposed": lambda: drawn(24, 11, seed=1).t()}


@needs_onednn
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("frozen", [False, True])
def test_value_and_gradients_are_those_of_linear(shape, bias, weight, frozen):
    def leaves() -> tuple[Tensor, Tensor, Tensor | None]:
        bias_O = drawn(11, seed=2).requires_grad_(not frozen) if bias else None
        return INPUTS[shape]().requires_grad_(), WEIGHTS[weight]().requires_grad_(not frozen), bias_O

    ours, theirs = leaves(), leaves()
    with onednn.linears():
        got = F.linear(*ours)
    expected = F.linear(*theirs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = drawn(*expected.shape, seed=3)
    got.backward(upstream)
    expected.backward(upstream)
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            continue
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_upstream_gradients_of_any_strides():
    x, w = drawn(4, 6, 24).requires_grad_(), drawn(11, 24, seed=1).requires_grad_()
    with onednn.linears():
        y = F.linear(x, w)
    y.transpose(0, 1).sum().backward()
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(4, 6, 24), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_it_is_used_where_it_fits_and_only_there():
    linear = torch.nn.Linear(4, 3)

    def node(x: Tensor, layer: torch.nn.Module = linear) -> str:
        with onednn.linears():
            return type(layer(x).grad_fn).__name__

    assert node(torch.ones(2, 4)) == "_LinearBackward"
    assert node(torch.ones(2, 4, dtype=torch.float64), torch.nn.Linear(4, 3).double()) != "_LinearBackward"
    assert node(torch.ones(2, 4, dtype=torch.bfloat16), torch.nn.Linear(4, 3).bfloat16()) != "_LinearBackward"
    assert node(torch.ones(0, 4)) != "_LinearBackward"
    assert node(torch.ones(2, 4, device="meta"), torch.nn.Linear(4, 3, device="meta")) != "_LinearBackward"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert node(torch.ones(2, 4)) != "_LinearBackward"
        with onednn.linears():
            assert linear(torch.ones(2, 4)).dtype == torch.bfloat16
    assert type(linear(torch.ones(2, 4)).grad_fn).__name__ != "_LinearBackward", "the mode ends with its block"


@needs_onednn
def test_a_second_derivative_is_refused_rather_than_wrong():
    x = drawn(2, 24).requires_grad_()
    with onednn.linears():
        y = F.linear(x, drawn(11, 24, seed=1).requires_grad_())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_gradient_is_recorded_under_no_grad():
    with torch.no_grad(), onednn.linears():
        assert not F.linear(drawn(2, 24), drawn(11, 24).requires_grad_()).requires_grad


@needs_onednn
def test_checkpointed_blocks_run_again_through_the_same_kernels():
    w = drawn(24, 24, seed=1).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return F.linear(x, w).sin()

    grads = []
    for context_fn in (None, onednn.checkpoint_contexts):
        w.grad, x = None, drawn(5, 24).requires_grad_()
        with onednn.linears():
            y = block(x) if context_fn is None else checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
            assert isinstance(y, Tensor)
            y.sum().backward()
        grads.append((x.grad, w.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "taken"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("GenuineIntel", "AVX512", True, False),
        ("GenuineIntel", "AVX2", True, False),
        ("GenuineIntel", "AVX512", False, True),
        ("", "DEFAULT", False, True),
        ("", "AVX512_BF16", True, True),
    ],
)
def test_taken_where_mkl_leaves_avx512_alone(monkeypatch, tmp_path, vendor, capability, mkl, taken):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: x\n")
    monkeypatch.setattr(onednn, "Path", lambda _: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(onednn, "available", lambda: True)
    assert PREFERRED.__wrapped__() is taken
