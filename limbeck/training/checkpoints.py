"""Checkpoints: everything that a step depends on, in safetensors, written atomically; the newest few are kept.

    checkpoints/step-000050/  model.safetensors  optimizer.safetensors  state.json  [average.safetensors]
    checkpoints/step-000050/  of a student that is sharded over ranks: see checkpoint_shards.py
    checkpoints/best-000050.safetensors    the weights of the lowest loss on the set-aside responses
    checkpoints/best-000050.json           their hash

Only trainable weights are kept: the rest of the student is rebuilt from the recipe. The learning rate, the order of the
data and all random numbers are functions of the seed and the step number, so that number is their whole state.

Every file is hashed when it is written and before it is read: a checkpoint that is not what was written is passed over
for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from limbeck.models.whole import is_sharded
from limbeck.runtime.files import whole_file, whole_folder, write_json
from limbeck.runtime.folders import remove
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import read_sealed, sealed
from limbeck.training.background import Background, on_host
from limbeck.training.checkpoint_shards import read_shards, read_whole, shapes_in, shards_in, write_shards
from limbeck.training.checkpoint_tensors import flat, named_groups, nested, once, parts, put_back
from limbeck.types import Json, LimbeckError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FILES = ("model.safetensors", "optimizer.safetensors")
# Of trainings whose teacher is the moving average of the student.
_AVERAGE = "average.safetensors"
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SCATTERED = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


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
        whole = _FILES if "shards" not in state else tuple(f for f in files if f.startswith("shard-"))
        complete = len(whole) == state.get("shards", len(_FILES)) and set(files) - {_AVERAGE} == set(whole)
        if state.get("step") != step_of(path) or not complete:
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
    background: Background | None = None,
) -> Path:
    """Write the checkpoint of a finished step, then remove all but the newest `keep`.

    All ranks call, and rank 0 writes; of a sharded model each its own part.

    Args:
        average: weights that follow the model's, where any do.
        background: writes it beside what comes next; without one it is on disk when this returns.
    """
    target = path_of(folder, step)
    on_cpu = _is_on_cpu(model)
    copies = background is not None and not on_cpu
    if copies and average is not None:
        average = on_host(average)
    # Of objects that change in the next step.
    state = deepcopy({"step": step, **state})
    if any(is_sharded(parameter) for parameter in model.parameters()):
        tensors = parts(model, optimizer)
        group = None if background is None else background.group
        work = partial(_write_shards, target, on_host(tensors) if copies else tensors, average, state, keep, group)
    else:
        gathered = get_model_state_dict(model, options=_GATHERED)
        updated = get_optimizer_state_dict(model, optimizer, options=_GATHERED)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return target
        weights, moments = once(gathered, model), flat(updated["state"])
        if copies:
            # Counts of steps lie on the host before they are gathered there.
            moments = {name: value if value.ndim else value.clone() for name, value in moments.items()}
        work = partial(_write_whole, target, weights, moments, average, state, keep)
    if background is None:
        work(lambda: None)
    else:
        background.begin(work, reads_weights=on_cpu)
    return target


def _is_on_cpu(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


def _write_whole(
    target: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    state: Json,
    keep: int,
    read: Callable[[], None],
) -> None:
    with whole_folder(target) as partial_folder:
        save_file(dict(weights), partial_folder / "model.safetensors")
        save_file(dict(moments), partial_folder / "optimizer.safetensors")
        _save_average(partial_folder, average)
        read()
        files = {path.name: sha256_of(path) for path in sorted(partial_folder.iterdir())}
        write_json(partial_folder / "state.json", sealed({**state, "files": files}))
    _remove_others(target, keep)


def _write_shards(
    target: Path,
    tensors: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    state: Json,
    keep: int,
    group: ProcessGroup | None,
    read: Callable[[], None],
) -> None:
    first = torch.distributed.get_rank() == 0
    with whole_folder(target) if first else nullcontext(target.with_name(f".{target.name}.partial")) as partial_folder:
        torch.distributed.barrier(group)
        kept = _save_average(partial_folder, average) if first else None
        files = write_shards(partial_folder, tensors, group, read)
        if first:
            files |= {} if kept is None else {kept.name: sha256_of(kept)}
            shards = len(shards_in(partial_folder))
            write_json(partial_folder / "state.json", sealed({**state, "shards": shards, "files": files}))
    if first:
        _remove_others(target, keep)
    # A rank that is ahead would take the one before for the newest.
    torch.distributed.barrier(group)


def _save_average(folder: Path, average: Mapping[str, Tensor] | None) -> Path | None:
    if average is None:
        return None
    save_file({name: value.contiguous() for name, value in average.items()}, folder / _AVERAGE)
    return folder / _AVERAGE


def _remove_others(newest: Path, keep: int) -> None:
    """Remove all checkpoints but this one and some before it; what is further on was passed over."""
    every = all_in(newest.parent)
    past = [path for path in every if step_of(path) <= step_of(newest)]
    for old in [*past[:-keep], *every[len(past) :]]:
        remove(old)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the trainable weights alone, where a training ended that another one follows. Rank 0 writes."""
    weights = get_model_state_dict(model, options=_GATHERED)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _write_weights(path, once(weights, model), lambda: None)


def _write_weights(path: Path, weights: Mapping[str, Tensor], read: Callable[[], None]) -> None:
    with whole_file(path) as partial_file:
        save_file(dict(weights), partial_file)
    read()
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


def save_best(folder: Path, step: int, model: nn.Module, background: Background) -> None:
    """Keep the trainable weights as the best so far, in place of those that were before; all ranks call.

    Args:
        background: writes them beside what comes next.
    """
    weights = get_model_state_dict(model, options=_GATHERED)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    # What was gathered, or is on an accelerator, is a copy.
    reads_weights = _is_on_cpu(model) and not any(is_sharded(parameter) for parameter in model.parameters())
    background.begin(partial(_write_best, _best(folder, step), once(weights, model)), reads_weights=reads_weights)


def _write_best(path: Path, weights: Mapping[str, Tensor], read: Callable[[], None]) -> None:
    _write_weights(path, weights, read)
    for other in path.parent.glob("best-*.safetensors"):
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
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    if sharded or shards_in(path):
        kept = parts(model, optimizer)
        _require_parts(path, kept)
        read_shards(path, kept)
        put_back(kept, model, optimizer)
        return _state_of(path)
    weights: dict[str, Any] = dict(load_file(path / "model.safetensors"))
    _require_same(path, weights, model)
    set_model_state_dict(model, weights, options=_SCATTERED)
    moments: dict[str, Any] = {"state": nested(load_file(path / "optimizer.safetensors"))}
    moments["param_groups"] = named_groups(model, optimizer)
    unknown = moments["state"].keys() - {name for name, _ in model.named_parameters()}
    # Plain gradient descent keeps nothing.
    without = isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]
    if unknown or not (moments["state"] or without):
        raise _of_another(path, min(unknown, default="no moments at all"))
    if moments["state"]:
        set_optimizer_state_dict(model, optimizer, moments, options=_SCATTERED)
    return _state_of(path)


def _state_of(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_sealed(path / "state.json").items() if key not in ("files", "shards")}


def _require_parts(path: Path, kept: Mapping[str, Tensor]) -> None:
    """A checkpoint of either kind has the trained weights and moments of a model, in their shapes."""
    shapes = {name: shape for name, (shape, _) in shapes_in(path).items()}
    wrong = [name for name, part in kept.items() if shapes.get(name) != part.shape]
    # An average, beside them, has names without the first word.
    unknown = [name for name in shapes if name.startswith("student.") and name not in kept]
    if wrong or unknown:
        raise _of_another(path, min([*wrong, *unknown]))


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
    if shards_in(path):
        trained = (name for name, parameter in student.named_parameters() if parameter.requires_grad)
        weights = read_whole(path, [f"student.{name}" for name in trained])
    else:
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
