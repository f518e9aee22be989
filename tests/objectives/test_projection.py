"""The product of hidden states and head, written into a buffer in strips of the vocabulary."""

import pytest
import torch

from limbeck.objectives.fused import projection as heads
from limbeck.ops import onednn
from limbeck.types import Head


@pytest.mark.parametrize("strip_bytes", [1, 4 * 5 * 7, 4 * 5 * 1000])
def test_strips_of_any_width_make_up_the_product(strip_bytes: int, monkeypatch: pytest.MonkeyPatch):
    if not onednn.available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(onednn, "preferred", lambda: True)
    monkeypatch.setattr(heads, "STRIP_BYTES", strip_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(5, 8, generator=generator), torch.randn(33, 8, generator=generator)
    bias_V = torch.randn(33, generator=generator)
    head = Head(weight_VD=weight_VD, vocab_size=30, bias_V=bias_V)
    out_NV = torch.full((5, 30), float("nan"))

    heads.prepare_projection(hidden_ND, head, "student").into(hidden_ND, out_NV)

    torch.testing.assert_close(out_NV, hidden_ND @ weight_VD[:30].T + bias_V[:30], rtol=1e-5, atol=1e-5)
