"""Checkpoints: everything that a step depends on, in safetensors, written atomically; the newest few are kept.

    checkpoints/step-000050/  model.safetensors  optimizer.safetensors  state.json  [average.safetensors]
    checkpoints/step-000050/  of a student that is sharded over ranks: see checkpoint_shards.py
    checkpoints/best-000050/  the best student so far, as long as a checkpoint names it: see trained_weights.py

Only trainable weights are kept: the rest of the student is rebuilt from the recipe. The learning rate, the order of the
data and all random numbers are functions of the seed and the step number, so that number is their whole state.

A checkpoint that is not what was written is passed over for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from limbeck.runtime.folders import remove
from limbeck.training.background import Background, begin_or_do, on_host
from limbeck.training.checkpoint_files import (
    fault_of,
    is_on_cpu,
    is_sharded_model,
    of_another,
    require_parts,
    require_same,
    state_in,
    write_parts,
    write_whole,
)
from limbeck.training.checkpoint_shards import read_shards, read_whole, shards_in
from limbeck.training.checkpoint_tensors import (
    GATHERED,
    SCATTERED,
    flat,
    named_groups,
    nested,
    once,
    parts,
    put_back,
)
from limbeck.types import LimbeckError

_FILES = ("model.safetensors", "optimizer.safetensors")
# Of trainings whose teacher is the moving average of the student.
_AVERAGE = "average.safetensors"


def all_in(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first. A partial one has another name and is never found."""
    return sorted(folder.glob("step-*"), key=step_of)


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(path.name.removeprefix("step-"))


def usable(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Path | None:
    """The last checkpoint that is what was written.

    Args:
        warn: called with each one that is passed over.
    """
    for path in reversed(all_in(folder)):
        fault = fault_of(path, _FILES, step=step_of(path))
        if fault is None:
            return path
        warn(f"the checkpoint {path} is damaged ({fault}); it is passed over for the one before it, or for the start")
    return None


def save(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: dict[str, Tensor] | None = None,
    keep: int,
    background: Background | None = None,
) -> Path:
    """Write the checkpoint of a finished step, then remove all but the newest `keep`.

    All ranks call, and rank 0 writes; of a sharded model each its own part.

    Args:
        average: weights that follow the model's, where any do.
        background: writes it beside what comes next; without one it is on disk when this returns.
    """
    target = path_of(folder, step)
    on_cpu = is_on_cpu(model)
    copies = background is not None and not on_cpu
    if average is not None:
        average = {name: value.contiguous() for name, value in (on_host(average) if copies else average).items()}
    files = {} if average is None else {_AVERAGE: average}
    # Of objects that change in the next step.
    state = deepcopy({"step": step, **state})
    after = partial(_remove_others, target, keep)
    if is_sharded_model(model):
        tensors = parts(model, optimizer)
        group = None if background is None else background.group
        work = partial(write_parts, target, on_host(tensors) if copies else tensors, files, state, after, group)
    else:
        gathered = get_model_state_dict(model, options=GATHERED)
        updated = get_optimizer_state_dict(model, optimizer, options=GATHERED)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return target
        weights, moments = once(gathered, model), flat(updated["state"])
        if copies:
            # Counts of steps lie on the host before they are gathered there.
            moments = {name: value if value.ndim else value.clone() for name, value in moments.items()}
        work = partial(write_whole, target, dict(zip(_FILES, (weights, moments), strict=True)) | files, state, after)
    begin_or_do(work, background, reads_weights=on_cpu)
    return target


def _remove_others(newest: Path, keep: int) -> None:
    """Remove all checkpoints but this one and some before it; what is further on was passed over."""
    every = all_in(newest.parent)
    past = [path for path in every if step_of(path) <= step_of(newest)]
    for old in [*past[:-keep], *every[len(past) :]]:
        remove(old)
    remove_unnamed(newest.parent)


def best_path_of(folder: Path, step: int) -> Path:
    """The folder of the best student so far, by the step that it was measured after."""
    return folder / f"best-{step:06d}"


def remove_unnamed(folder: Path, best: Path | None = None) -> None:
    """Remove the best students that no checkpoint names, but for the one that the next may name.

    A training that goes on from a checkpoint hands on the one that this names, unless it comes to a better one again.
    """
    named = {best, *(_best_in(path) for path in all_in(folder))}
    for other in folder.glob("best-*"):
        if other not in named:
            remove(other)


def _best_in(path: Path) -> Path | None:
    """The best student that a checkpoint names; one that is damaged is passed over."""
    try:
        best = state_in(path).get("best")
    except (LimbeckError, OSError):
        return None
    return None if best is None else best_path_of(path.parent, best["step"])


def restore(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint back; returns what `save` was given as its state. All ranks call, all read.

    Raises:
        LimbeckError: it is of another student.
    """
    if is_sharded_model(model) or shards_in(path):
        kept = parts(model, optimizer)
        require_parts(path, kept, beside=(path / _AVERAGE,))
        read_shards(path, kept)
        put_back(kept, model, optimizer)
        return state_in(path)
    weights: dict[str, Any] = dict(load_file(path / "model.safetensors"))
    require_same(path, weights, model)
    set_model_state_dict(model, weights, options=SCATTERED)
    moments: dict[str, Any] = {"state": nested(load_file(path / "optimizer.safetensors"))}
    moments["param_groups"] = named_groups(model, optimizer)
    unknown = moments["state"].keys() - {name for name, _ in model.named_parameters()}
    # Plain gradient descent keeps nothing.
    without = isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]
    if unknown or not (moments["state"] or without):
        raise of_another(path, min(unknown, default="no moments at all"))
    if moments["state"]:
        set_optimizer_state_dict(model, optimizer, moments, options=SCATTERED)
    return state_in(path)


def average_of(path: Path) -> dict[str, Tensor]:
    """The weights that followed the model's.

    Raises:
        LimbeckError: the checkpoint has none.
    """
    if not (path / _AVERAGE).exists():
        raise of_another(path, _AVERAGE)
    return load_file(path / _AVERAGE)


def restore_student(path: Path, student: nn.Module) -> None:
    """Put the student's weights of a checkpoint into the student alone, outside of what trains it."""
    if shards_in(path):
        trained = (name for name, parameter in student.named_parameters() if parameter.requires_grad)
        weights = read_whole(path, [f"student.{name}" for name in trained])
    else:
        weights = load_file(path / "model.safetensors")
    own = {name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")}
    require_same(path, own, student)
    student.load_state_dict(own, strict=False)
