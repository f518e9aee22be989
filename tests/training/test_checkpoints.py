"""Checkpoints: whole or absent, nothing but safetensors and JSON, every number exact."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from limbeck.runtime.files import read_json
from limbeck.training import checkpoint_files, checkpoints
from tests.training.play import identical, play, settings, tiny_lora, tiny_model, weights


def trained(model: nn.Module, steps: int = 3) -> torch.optim.AdamW:
    """AdamW after some steps on noise, over two groups as the loop has them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2, fused=True)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in trainable:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {f"{names[id(p)]}.{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}


@pytest.mark.parametrize("make", [lambda s: tiny_model(s), lambda s: tiny_model(s, tied=False), lambda s: tiny_lora(s)])
def test_weights_moments_and_state_come_back_exactly(tmp_path, make):
    model = make(1)
    optimizer = trained(model)
    state = {"tokens": 12345678901, "seconds": 0.1 + 0.2}
    path = checkpoints.save(tmp_path, 3, model=model, optimizer=optimizer, state=state, keep=1)
    other = make(1)
    fresh = trained(other, steps=1)
    assert checkpoints.restore(path, model=other, optimizer=fresh) == {"step": 3, **state}
    assert identical(weights(model), weights(other))
    assert identical(moments(model, optimizer), moments(other, fresh))
    # The optimizer goes on as the first one does.
    for either, its in ((model, optimizer), (other, fresh)):
        for parameter in either.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        its.step()
    assert identical(weights(model), weights(other))


def test_settings_are_the_recipes_and_not_the_checkpoints(tmp_path):
    model = tiny_model(1)
    optimizer = trained(model)
    path = checkpoints.save(tmp_path, 3, model=model, optimizer=optimizer, state={}, keep=1)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    checkpoints.restore(path, model=model, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_saving_changes_nothing(tmp_path):
    model = tiny_model(1)
    optimizer = trained(model)
    before = weights(model), {k: v.clone() for k, v in moments(model, optimizer).items()}
    checkpoints.save(tmp_path, 3, model=model, optimizer=optimizer, state={}, keep=1)
    assert identical(before[0], weights(model)) and identical(before[1], moments(model, optimizer))


def test_only_safetensors_and_json(tmp_path):
    play(tiny_model(1), tmp_path, settings(save_steps=2))
    files = sorted(p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    for path in files:
        _ = load_file(path) if path.suffix == ".safetensors" else read_json(path)


def test_tied_weights_are_stored_once(tmp_path):
    sizes = {}
    for tied in (True, False):
        model = tiny_model(1, tied=tied)
        path = checkpoints.save(tmp_path / str(tied), 1, model=model, optimizer=trained(model), state={}, keep=1)
        stored = load_file(path / "model.safetensors")
        assert ("lm_head.weight" in stored) != tied
        assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
        sizes[tied] = (path / "model.safetensors").stat().st_size
    assert sizes[True] < sizes[False]


def test_a_tie_survives(tmp_path):
    model, other = tiny_model(1), tiny_model(2)
    path = checkpoints.save(tmp_path, 1, model=model, optimizer=trained(model), state={}, keep=1)
    checkpoints.restore(path, model=other, optimizer=trained(other))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert identical(weights(other), weights(model))


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    assert checkpoints.usable(tmp_path / "absent") is None
    for name in ("step-000002", "step-999999", "step-1000000", ".step-2000000.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints.all_in(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    model = tiny_model(1)
    optimizer = trained(model)
    first = checkpoints.save(tmp_path, 1, model=model, optimizer=optimizer, state={}, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(tmp_path, 2, model=model, optimizer=optimizer, state={}, keep=1)
    assert checkpoints.usable(tmp_path) == first
    monkeypatch.undo()
    second = checkpoints.save(tmp_path, 2, model=model, optimizer=optimizer, state={}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [second.name]
