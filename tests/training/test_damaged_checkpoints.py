"""Checkpoints that are not what was written are passed over, and those of another student refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from limbeck.training import checkpoints, trained_weights
from limbeck.types import LimbeckError
from tests.training.play import identical, tiny_model, weights
from tests.training.test_checkpoints import trained


def other_tensors(path: Path) -> None:
    save_file({"zzz": torch.zeros(3)}, path / "model.safetensors")


def other_moments(path: Path) -> None:
    save_file({"zzz.exp_avg": torch.zeros(3)}, path / "optimizer.safetensors")


def one_bit(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "optimizer.safetensors").write_bytes(bytes(data))


def older_weights(path: Path) -> None:
    shutil.copy(path.with_name("step-000001") / "model.safetensors", path / "model.safetensors")


def all_of_an_older_one(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000001"), path)


def another_number(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"tokens": 8}))


def no_state(path: Path) -> None:
    (path / "state.json").unlink()


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def a_list(path: Path) -> None:
    (path / "state.json").write_text("[]")


DAMAGES = (other_tensors, other_moments, one_bit, older_weights, all_of_an_older_one, another_number)


@pytest.mark.parametrize("damage", [*DAMAGES, no_state, no_weights, a_list])
def test_the_older_good_one_is_taken(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model, paths = tiny_model(1), []
    for step in (1, 2):
        optimizer = trained(model)
        paths.append(checkpoints.save(tmp_path, step, model=model, optimizer=optimizer, state={"tokens": 7}, keep=3))
    assert checkpoints.usable(tmp_path) == paths[1]
    damage(paths[1])
    said: list[str] = []
    assert checkpoints.usable(tmp_path, said.append) == paths[0]
    assert len(said) == 1 and f"the checkpoint {paths[1]} is damaged" in said[0]
    # It does not outlive the next one, nor push a good one out.
    third = checkpoints.save(tmp_path, 2, model=model, optimizer=trained(model), state={"tokens": 7}, keep=1)
    assert checkpoints.all_in(tmp_path) == [third] and checkpoints.usable(tmp_path) == third


def test_what_was_passed_over_goes_before_good_ones(tmp_path: Path) -> None:
    model = tiny_model(1)
    optimizer = trained(model)
    for step in (2, 4):
        checkpoints.save(tmp_path, step, model=model, optimizer=optimizer, state={}, keep=2)
    other_tensors(tmp_path / "step-000004")
    checkpoints.save(tmp_path, 3, model=model, optimizer=optimizer, state={}, keep=2)
    assert [path.name for path in checkpoints.all_in(tmp_path)] == ["step-000002", "step-000003"]


@pytest.mark.parametrize("damage", [no_state, other_tensors])
def test_none_is_left(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model = tiny_model(1)
    damage(checkpoints.save(tmp_path, 1, model=model, optimizer=trained(model), state={}, keep=1))
    assert checkpoints.usable(tmp_path) is None


def test_whole_but_of_another_student(tmp_path: Path) -> None:
    """As after a parameter's name has changed: nothing is damaged, and nothing fits."""
    model, other = tiny_model(1), torch.nn.Sequential(torch.nn.Linear(3, 3))
    path = checkpoints.save(tmp_path, 1, model=other, optimizer=trained(other), state={}, keep=1)
    before = weights(model)
    with pytest.raises(LimbeckError, match=r"is of another student.*; delete .* to train from the start"):
        checkpoints.restore(path, model=model, optimizer=trained(model, 0))
    with pytest.raises(LimbeckError, match="is of another student"):
        checkpoints.restore_student(path, model)
    assert identical(before, weights(model))


def test_moments_of_another_student(tmp_path: Path) -> None:
    model = tiny_model(1)
    optimizer = trained(model)
    path = checkpoints.save(tmp_path, 1, model=model, optimizer=optimizer, state={}, keep=1)
    for moments in ({"zzz.exp_avg": torch.zeros(3)}, {}):
        save_file(moments, path / "optimizer.safetensors")
        with pytest.raises(LimbeckError, match="is of another student"):
            checkpoints.restore(path, model=model, optimizer=optimizer)


def test_weights_alone(tmp_path: Path) -> None:
    model, folder = tiny_model(1), tmp_path / "done"
    assert not trained_weights.has(folder)
    trained_weights.save(folder, model)
    assert trained_weights.has(folder)
    shutil.copytree(folder, tmp_path / "best-000001")
    assert not trained_weights.has(tmp_path / "best-000001")
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert not trained_weights.has(folder)
    with pytest.raises(LimbeckError, match=r"best-000001, the best student .* delete .*from the start"):
        trained_weights.restore_best(tmp_path, 1, model)
