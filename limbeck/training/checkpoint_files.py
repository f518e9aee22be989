"""Folders of tensors that a training keeps: written whole or not at all, hashed, and held against what is trained.

    FOLDER/  model.safetensors ... state.json          of a whole student, by rank 0
    FOLDER/  shard-00001-model-....safetensors ...     of a student that is sharded: see checkpoint_shards.py

Every file is hashed when it is written and before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.models.whole import is_sharded
from limbeck.runtime.files import whole_folder, write_json
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import read_sealed, sealed
from limbeck.training.checkpoint_shards import shapes_in, shards_in, write_shards
from limbeck.types import Json, LimbeckError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STATE = "state.json"


def is_on_cpu(model: nn.Module) -> bool:
    """Whether every weight is in the host's memory."""
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


def is_sharded_model(model: nn.Module) -> bool:
    """Whether this rank has a part of some weight alone."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def write_whole(
    target: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Json,
    after: Callable[[], None],
    read: Callable[[], None],
) -> None:
    """Write the folder of a whole student.

    Args:
        files: tensors of each file, by its name.
        after: called when the folder is on disk.
        read: called when all tensors are written.
    """
    with whole_folder(target) as partial_folder:
        for name, tensors in files.items():
            save_file(dict(tensors), partial_folder / name)
        read()
        hashes = {path.name: sha256_of(path) for path in sorted(partial_folder.iterdir())}
        write_json(partial_folder / _STATE, sealed({**state, "files": hashes}))
    after()


def write_parts(
    target: Path,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, Mapping[str, Tensor]],
    state: Json,
    after: Callable[[], None],
    group: ProcessGroup | None,
    read: Callable[[], None],
) -> None:
    """Write the folder of a sharded student: each rank its own part. All ranks call.

    Args:
        files: tensors of further files, which rank 0 writes.
        after: called on rank 0 when the folder is on disk.
        group: of the calls between the ranks; None for that of the training.
        read: called when this rank's tensors are written.
    """
    first = torch.distributed.get_rank() == 0
    with whole_folder(target) if first else nullcontext(target.with_name(f".{target.name}.partial")) as partial_folder:
        torch.distributed.barrier(group)
        own = files if first else {}
        for name, further in own.items():
            save_file(dict(further), partial_folder / name)
        hashes = write_shards(partial_folder, tensors, group, read)
        if first:
            hashes |= {name: sha256_of(partial_folder / name) for name in own}
            shards = len(shards_in(partial_folder))
            write_json(partial_folder / _STATE, sealed({**state, "shards": shards, "files": hashes}))
    if first:
        after()
    # A rank that is ahead would take the one before for the newest.
    torch.distributed.barrier(group)


def state_in(folder: Path) -> Json:
    """What was given as the state of a folder."""
    return {key: value for key, value in read_sealed(folder / _STATE).items() if key not in ("files", "shards")}


def fault_of(folder: Path, files: Collection[str], **state: Any) -> str | None:
    """Fault of a folder, None where there is none.

    Args:
        files: names of the files that one of a whole student has at least.
        state: what its state says of it.
    """
    try:
        found = read_sealed(folder / _STATE)
        hashes: dict[str, str] = found.get("files", {})
        shards = [name for name in hashes if name.startswith("shard-")]
        complete = len(shards) == found["shards"] if "shards" in found else set(files) <= set(hashes)
        if not complete or any(found.get(key) != value for key, value in state.items()):
            return f"{_STATE} is of another one"
        return next((f"{n} is not what was written" for n in hashes if sha256_of(folder / n) != hashes[n]), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (LimbeckError, OSError):
        return f"{_STATE} cannot be read"


def require_parts(folder: Path, kept: Mapping[str, Tensor], *, beside: Collection[Path] = ()) -> None:
    """A folder of either kind has tensors of these names and whole shapes, and no others.

    Args:
        beside: files of it that hold something else.

    Raises:
        LimbeckError: it is of another student.
    """
    shapes = {name: shape for name, (shape, _) in shapes_in(folder).items()}
    wrong = [name for name, part in kept.items() if shapes.get(name) != part.shape]
    others: set[str] = set()
    for file in beside:
        if file.exists():
            with safe_open(file, framework="pt") as opened:
                others.update(opened.keys())
    if wrong := [*wrong, *(shapes.keys() - kept.keys() - others)]:
        raise of_another(folder, min(wrong))


def require_same(folder: Path, weights: Mapping[str, Any], model: nn.Module) -> None:
    """Weights are all those that are trained of a model, in their shapes.

    Raises:
        LimbeckError: they are of another student.
    """
    trained = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: tensor.shape for name, tensor in weights.items() if name in trained}
    known: Collection[str] = model.state_dict().keys()
    wrong = [name for name in {**trained, **weights} if name not in known or trained.get(name) != found.get(name)]
    if wrong:
        raise of_another(folder, min(wrong))


def of_another(folder: Path, name: str) -> LimbeckError:
    """The error of a folder that holds something else than what is trained."""
    return LimbeckError(
        f"{folder} is of another student, or of another version of limbeck ({name}); delete {folder.parent} and run "
        "the same command again to train from the start"
    )
