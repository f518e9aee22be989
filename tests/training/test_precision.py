"""Weights in 16 bits: how many an update of the size of the learning rate cannot move."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from limbeck.training.precision import unmoved_share
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair
from tests.training.play import tiny_lora, tiny_model


@pytest.mark.parametrize("rate", [1e-6, 3e-5, 3e-4, 1e-2])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_the_share_is_that_of_weights_whose_spacing_is_wide(rate, dtype, bits):
    """Half the spacing of the numbers around a weight against the update; half as wide below a power of two."""
    model = tiny_model(1, dtype=dtype)
    unmoved = total = 0
    for parameter in model.parameters():
        for weight in parameter.flatten().tolist():
            exponent = math.frexp(weight)[1] - 1 if weight else -1000
            spacing = 2.0 ** (max(exponent, -14 if dtype is torch.float16 else -126) - bits + 1)
            towards_zero = spacing / 2 if abs(weight) == 2.0**exponent and exponent > -14 else spacing
            # A tie goes to the even neighbour, which no weight here meets.
            unmoved += rate < min(spacing, towards_zero) / 2
            total += 1
    found = unmoved_share(model, rate)
    assert found is not None and found[1] is dtype
    assert found[0] == pytest.approx(unmoved / total, abs=1e-9)


def test_it_is_what_adamw_does():
    """One step of AdamW moves a weight by the rate, whatever its gradient."""
    model = tiny_model(1, dtype=torch.bfloat16)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = unmoved_share(model, 3e-5)
    assert found is not None
    assert (after == before).float().mean().item() == pytest.approx(found[0], abs=0.02)
    assert found[0] > 0.9


def test_weights_in_float32_and_frozen_ones_do_not_count():
    assert unmoved_share(tiny_model(1), 3e-5) is None
    assert unmoved_share(tiny_lora(1, dtype=torch.bfloat16), 3e-5) is None, "adapters are kept in float32"
    model = tiny_model(1, dtype=torch.bfloat16)
    model.requires_grad_(False)
    assert unmoved_share(model, 3e-5) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_command_says_it_once(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, dtype: str) -> None:
    recipe = tiny.recipe(tmp_path / "run", student={"dtype": dtype}, train={"max_steps": 2, "learning_rate": 3e-5})
    finished = limbeck.run("train", recipe)
    assert finished.code == 0, finished.stderr
    said = [line for line in finished.stderr.splitlines() if "without a float32 copy" in line]
    assert len(said) == (dtype == "bfloat16")
    if said:
        assert "bfloat16" in said[0] and "set student.dtype=float32 train.bf16=true" in said[0]
        share = re.search(r"the learning rate \(3e-05\) are rounded away at (\d+)% of them", said[0])
        assert share is not None and int(share[1]) > 80
