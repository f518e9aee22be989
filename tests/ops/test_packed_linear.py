"""Linear layers with their weights laid out for oneDNN: the same products, the model untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.ops.onednn import available
from limbeck.ops.packed_linear import PackedLinears

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN")


@pytest.mark.parametrize("packed_gib", [0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (1, 1, 33), (0, 33)])
def test_error_is_within_that_of_torch(packed_gib: float, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(33, 70, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        plain = layer(x)
        with PackedLinears(layer, rows=8, packed_gib=packed_gib):
            first, again = layer(x), layer(x)
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert torch.equal(first, again) and first.shape == plain.shape
    if x.numel():
        assert (first - exact).abs().max() <= 3 * (plain - exact).abs().max() + 1e-6


def test_a_weight_changed_in_place_is_read_anew() -> None:
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)
    mode = PackedLinears(layer, rows=4, packed_gib=1.0)
    with torch.inference_mode(), mode:
        before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with torch.inference_mode(), mode:
        torch.testing.assert_close(layer(x), 2 * before)


def test_slices_of_one_weight_are_told_apart() -> None:
    layer, x = nn.Linear(8, 12, bias=False), torch.randn(4, 8)
    with torch.inference_mode(), PackedLinears(layer, rows=4, packed_gib=1.0):
        whole, part = layer(x), nn.functional.linear(x, layer.weight[:5])
    torch.testing.assert_close(part, whole[:, :5])


def test_gradients_and_other_precisions_pass_through() -> None:
    layer = nn.Linear(8, 8)
    with PackedLinears(layer, rows=4, packed_gib=1.0):
        layer(torch.randn(4, 8)).sum().backward()
        with torch.inference_mode():
            assert layer.double()(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64
    assert layer.weight.grad is not None
