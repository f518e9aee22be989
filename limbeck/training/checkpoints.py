"""Checkpoints: everything that a step depends on, in safetensors, written atomically; the newest few are kept.

    checkpoints/step-000050/  model.safetensors  optimizer.safetensors  state.json  [average.safetensors]
    checkpoints/best-000050.safetensors    the weights of the lowest loss on the set-aside responses
    checkpoints/best-000050.json           their hash

Only trainable weights are kept: the rest of the student is rebuilt from the recipe. The learning rate, the order of the
data and all random numbers are functions of the seed and the step number, so that number is their whole state.

Every file is hashed when it is written and before it is read: a checkpoint that is not what was written is passed over
for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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

from limbeck.runtime.files import whole_file, whole_folder, write_json
from limbeck.runtime.folders import remove
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import read_sealed, sealed
from limbeck.types import LimbeckError

_FILES = ("model.safetensors", "optimizer.safetensors")
# Of trainings whose teacher is the moving average of the student.
_AVERAGE = "average.safetensors"
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


def usable(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Path | None:
    """The last checkpoint that is what was written.

    Args:
        warn: called with each one that is passed over.
    """
    for path in reversed(all_in(folder)):
        fault = _fault(path)
        if fault is None:
            return path
        warn(f"the checkpoint {path} is damaged ({fault}); it is passed over for the one before it, or for the start")
    return None


def _fault(path: Path) -> str | None:
    """Fault of a checkpoint, None where there is none."""
    try:
        state = read_sealed(path / "state.json")
        files = state.get("files", {})
        if state.get("step") != step_of(path) or set(files) - {_AVERAGE} != set(_FILES):
            return "state.json is of another one"
        return next((f"{n} is not what was written" for n in files if sha256_of(path / n) != files[n]), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (LimbeckError, OSError):
        return "state.json cannot be read"


def save(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: dict[str, Tensor] | None = None,
    keep: int,
) -> Path:
    """Write the checkpoint of a finished step, then remove all but the newest `keep`. All ranks call, rank 0 writes.

    Args:
        average: weights that follow the model's, where any do.
    """
    weights = get_model_state_dict(model, options=_GATHERED)
    moments = get_optimizer_state_dict(model, optimizer, options=_GATHERED)
    target = folder / f"step-{step:06d}"
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return target
    with whole_folder(target) as partial:
        save_file(_once(weights, model), partial / "model.safetensors")
        save_file(_flat(moments["state"]), partial / "optimizer.safetensors")
        if average is not None:
            save_file({name: value.contiguous() for name, value in average.items()}, partial / _AVERAGE)
        files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        write_json(partial / "state.json", sealed({"step": step, **state, "files": files}))
    # What is further on was passed over.
    every = all_in(folder)
    past = [path for path in every if step_of(path) <= step]
    for old in [*past[:-keep], *every[len(past) :]]:
        remove(old)
    return target


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the trainable weights alone, where a training ended that another one follows. Rank 0 writes."""
    weights = get_model_state_dict(model, options=_GATHERED)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with whole_file(path) as partial:
            save_file(_once(weights, model), partial)
        write_json(path.with_suffix(".json"), sealed({"name": path.name, "sha256": sha256_of(path)}))


def has_weights(path: Path) -> bool:
    """Whether the file of `save_weights` exists and is unchanged."""
    try:
        return read_sealed(path.with_suffix(".json")) == {"name": path.name, "sha256": sha256_of(path)}
    except (LimbeckError, OSError):
        return False


def restore_weights(path: Path, model: nn.Module) -> None:
    """Put the weights of `save_weights` back.

    Raises:
        LimbeckError: they are those of another student.
    """
    weights: dict[str, Any] = dict(load_file(path))
    _require_same(path, weights, model)
    set_model_state_dict(model, weights, options=_SCATTERED)


def save_best(folder: Path, step: int, model: nn.Module) -> None:
    """Keep the trainable weights as the best so far, in place of those that were before."""
    path = _best(folder, step)
    save_weights(path, model)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for other in folder.glob("best-*.safetensors"):
            if other != path:
                other.unlink()
                other.with_suffix(".json").unlink(missing_ok=True)


def restore_best(folder: Path, step: int, model: nn.Module) -> None:
    """Put the weights of `save_best` back. All ranks call, after the first one wrote.

    Raises:
        LimbeckError: they are not what was written.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    path = _best(folder, step)
    if not has_weights(path):
        raise LimbeckError(
            f"{path}, the best student of the training, is missing or damaged; delete {folder} and run the same "
            "command again to train from the start"
        )
    restore_weights(path, model)


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step:06d}.safetensors"


def restore(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint back; returns what `save` was given as its state. All ranks call, all read.

    Raises:
        LimbeckError: it is of another student.
    """
    weights: dict[str, Any] = dict(load_file(path / "model.safetensors"))
    _require_same(path, weights, model)
    set_model_state_dict(model, weights, options=_SCATTERED)
    moments: dict[str, Any] = {"state": _nested(load_file(path / "optimizer.safetensors"))}
    moments["param_groups"] = _named_groups(model, optimizer)
    unknown = moments["state"].keys() - {name for name, _ in model.named_parameters()}
    if unknown or not moments["state"]:
        raise _of_another(path, min(unknown, default="no moments at all"))
    set_optimizer_state_dict(model, optimizer, moments, options=_SCATTERED)
    return {key: value for key, value in read_sealed(path / "state.json").items() if key != "files"}


def average_of(path: Path) -> dict[str, Tensor]:
    """The weights that followed the model's.

    Raises:
        LimbeckError: the checkpoint has none.
    """
    if not (path / _AVERAGE).exists():
        raise _of_another(path, _AVERAGE)
    return load_file(path / _AVERAGE)


def restore_student(path: Path, student: nn.Module) -> None:
    """Put the student's weights of a checkpoint into the student alone, outside of what trains it."""
    weights = load_file(path / "model.safetensors")
    own = {name.removeprefix("student."): value for name, value in weights.items() if name.startswith("student.")}
    _require_same(path, own, student)
    student.load_state_dict(own, strict=False)


def _require_same(path: Path, weights: dict[str, Any], model: nn.Module) -> None:
    """Weights are all those that are trained of a model, in their shapes."""
    trained = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: tensor.shape for name, tensor in weights.items() if name in trained}
    known: Collection[str] = model.state_dict().keys()
    wrong = [name for name in {**trained, **weights} if name not in known or trained.get(name) != found.get(name)]
    if wrong:
        raise _of_another(path, min(wrong))


def _of_another(path: Path, name: str) -> LimbeckError:
    return LimbeckError(
        f"{path} is of another student, or of another version of limbeck ({name}); delete {path.parent} and run the "
        "same command again to train from the start"
    )


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
