"""Optimizers by name: the default is what it was, each goes on from a checkpoint, and plans know what each keeps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from limbeck.recipe.load import as_tree, load_recipe
from limbeck.recipe.optimizers import OPTIM, OPTIMIZERS, AdamW, FusedAdamW, Optimizer, Sgd, require_optimizer
from limbeck.recipe.sections import TrainSection
from limbeck.training import checkpoints, launch
from limbeck.training.loss import StudentLoss
from limbeck.types import LimbeckError

MEMBERS: dict[str, Optimizer] = {name: member() for name, member in OPTIMIZERS.items()} | {
    "momentum": Sgd(momentum=0.9)
}
PLAIN = {"teacher": {"model": "t"}, "student": {"model": "s"}}
WIDTH = 128


def installed(optim: Optimizer) -> None:
    if optim.package is not None and find_spec(optim.package) is None:
        pytest.skip(f"{optim.package} is not installed")


class Loss(nn.Module):
    """A module with a student in it, as the loop trains one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


def made(optim: Optimizer, **keys: Any) -> tuple[Loss, torch.optim.Optimizer]:
    module = Loss()
    settings = TrainSection(optim=optim, learning_rate=1e-3, **keys)
    return module, launch.optimizer(cast(StudentLoss, module), settings)


def steps(module: Loss, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for i in numbers:
        x_ND = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(i))
        module.student(x_ND).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_the_default_is_torchs_fused_adamw_with_decay_on_matrices() -> None:
    assert TrainSection().optim == FusedAdamW()
    module, optimizer = made(FusedAdamW(), weight_decay=0.3, adam_beta1=0.8)
    torch.manual_seed(0)
    plain = Loss()
    matrices, vectors = ([p for p in plain.parameters() if (p.ndim >= 2) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    naive = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), eps=1e-8, fused=True)
    assert type(optimizer) is torch.optim.AdamW
    for module_of, one in ((module, optimizer), (plain, naive)):
        steps(module_of, one, range(3))
    assert all(torch.equal(a, b) for a, b in zip(weights(module), weights(plain), strict=True))


@pytest.mark.parametrize("name", MEMBERS)
def test_a_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    optim = MEMBERS[name]
    installed(optim)
    module, optimizer = made(optim)
    start = weights(module)
    steps(module, optimizer, range(3))
    checkpoints.save(tmp_path, 3, model=module, optimizer=optimizer, state={"here": 3}, keep=1)
    steps(module, optimizer, range(3, 6))
    again, fresh = made(optim)
    path = checkpoints.usable(tmp_path)
    assert path is not None
    assert checkpoints.restore(path, model=again, optimizer=fresh)["here"] == 3
    assert not all(torch.equal(a, b) for a, b in zip(weights(again), start, strict=True))
    steps(again, fresh, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(module), weights(again), strict=True))


@pytest.mark.parametrize("name", MEMBERS)
def test_plans_know_what_is_kept_of_the_weights(name: str) -> None:
    optim = MEMBERS[name]
    installed(optim)
    module, optimizer = made(optim)
    steps(module, optimizer, range(1))
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    )
    count = sum(p.numel() for p in module.parameters())
    assert kept == pytest.approx(optim.state_bytes(count, 4, WIDTH), rel=0.05, abs=0.02 * count)


def test_moments_missing_from_a_checkpoint_are_seen(tmp_path: Path) -> None:
    module, plain = made(Sgd())
    steps(module, plain, range(1))
    checkpoints.save(tmp_path, 1, model=module, optimizer=plain, state={}, keep=1)
    other, adamw = made(AdamW())
    with pytest.raises(LimbeckError, match="no moments at all"):
        checkpoints.restore(tmp_path / "step-000001", model=other, optimizer=adamw)


def test_names_and_options_of_a_recipe() -> None:
    assert load_recipe(PLAIN, ["train.optim=sgd"]).train.optim == Sgd()
    recipe = load_recipe(PLAIN, ["train.optim={name: sgd, momentum: 0.5}"])
    assert recipe.train.optim == Sgd(momentum=0.5)
    assert as_tree(recipe)["train"]["optim"] == {"name": "sgd", "momentum": 0.5}
    assert load_recipe(as_tree(recipe)) == recipe
    assert {OPTIM.name_of(optim) for optim in MEMBERS.values()} == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.optim=adamw_torch_fuse"], "nearest: 'adamw_torch_fused'"),
        (["train.optim={name: adafactor, momentum: 0.5}"], "momentum is an option of sgd, not adafactor"),
        (["train.optim=sgd", "train.adam_beta1=0.5"], "train.adam_beta1 is 0.5, which train.optim=sgd does not read"),
        (["train.optim={name: sgd, momentum: 1.0}"], "momentum"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(LimbeckError, match=said):
        load_recipe(PLAIN, overrides)


def test_a_library_that_is_missing_and_a_student_that_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    eight = MEMBERS["adamw_bnb_8bit"]
    monkeypatch.setattr("limbeck.recipe.optimizers.find_spec", lambda name: None)
    with pytest.raises(LimbeckError, match=r"needs bitsandbytes, which is not installed; run pip install bitsandbytes"):
        require_optimizer(eight, sharded=False)
    monkeypatch.setattr("limbeck.recipe.optimizers.find_spec", lambda name: SimpleNamespace())
    with pytest.raises(LimbeckError, match=r"adamw_bnb_8bit updates no student that is sharded .* adamw_torch_fused"):
        require_optimizer(eight, sharded=True)
    for name in ("adamw_torch", "adamw_torch_fused", "sgd"):
        require_optimizer(MEMBERS[name], sharded=True)
