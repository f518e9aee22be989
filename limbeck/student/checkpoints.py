"""Checkpoints: everything a step depends on, in safetensors, atomically, the newest few.

    checkpoints/step-000050/  model.safetensors  optimizer.safetensors  state.json
    checkpoints/best-000050.safetensors    the weights of the lowest loss on the set-aside responses

Only trainable weights are kept: the rest of the student is rebuilt from the recipe. The learning rate, the order of the
data and all random numbers are functions of the seed and the step number, so that number is their whole state.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from limbeck.rundir import read_json, whole_file, whole_folder, write_json

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SCATTERED = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


def all_in(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first. A partial one has another name and is never found."""
    return sorted(folder.glob("step-*"), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint."""
    found = all_in(folder)
    return found[-1] if found else None


def save(
    folder: Path, step: int, *, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a finished step, then remove all but the newest `keep`. All ranks call, rank 0 writes."""
    weights = get_model_state_dict(model, options=_GATHERED)
    moments = get_optimizer_state_dict(model, optimizer, options=_GATHERED)
    target = folder / f"step-{step:06d}"
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return target
    with whole_folder(target) as partial:
        save_file(_once(weights, model), partial / "model.safetensors")
        save_file(_flat(moments["state"]), partial / "optimizer.safetensors")
        write_json(partial / "state.json", {"step": step, **state})
    for old in all_in(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the trainable weights alone, where a training ended that another one follows. Rank 0 writes."""
    weights = get_model_state_dict(model, options=_GATHERED)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with whole_file(path) as partial:
            save_file(_once(weights, model), partial)


def restore_weights(path: Path, model: nn.Module) -> None:
    """Put the weights of `save_weights` back."""
    set_model_state_dict(model, dict(load_file(path)), options=_SCATTERED)


def save_best(folder: Path, step: int, model: nn.Module) -> None:
    """Keep the trainable weights as the best so far, in place of those that were before."""
    path = _best(folder, step)
    save_weights(path, model)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for other in folder.glob("best-*.safetensors"):
            if other != path:
                other.unlink()


def restore_best(folder: Path, step: int, model: nn.Module) -> None:
    """Put the weights of `save_best` back. All ranks call, after the first one wrote."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    restore_weights(_best(folder, step), model)


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step:06d}.safetensors"


def restore(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint back; returns its state.json. All ranks call, all read."""
    weights: dict[str, Any] = dict(load_file(path / "model.safetensors"))
    set_model_state_dict(model, weights, options=_SCATTERED)
    moments: dict[str, Any] = {"state": _nested(load_file(path / "optimizer.safetensors"))}
    moments["param_groups"] = _named_groups(model, optimizer)
    set_optimizer_state_dict(model, optimizer, moments, options=_SCATTERED)
    return read_json(path / "state.json")


def restore_student(path: Path, student: nn.Module) -> None:
    """Put the student's weights of a checkpoint into the student alone, outside of what trains it."""
    weights = load_file(path / "model.safetensors")
    own = {name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")}
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == own.keys(), "a checkpoint holds what is trained of this student"
    student.load_state_dict(own, strict=False)


def _once(weights: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Tied weights under their first name alone; the model itself restores the tie."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    aliases = names - {name for name, _ in model.named_parameters()}
    return {name: tensor.contiguous() for name, tensor in weights.items() if name not in aliases}


def _flat(state: Any) -> dict[str, Tensor]:
    return {f"{name}.{key}": value.contiguous() for name, entry in state.items() for key, value in entry.items()}


def _nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition(".")
        state.setdefault(name, {})[key] = tensor
    return state


def _named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's own groups and settings (the recipe's), parameters by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
