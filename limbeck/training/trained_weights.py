"""The trained weights alone, in a folder: of the best student on the way, of a first stage that is over, and of the
student that each trial of a learning rate begins with.

    checkpoints/best-000050/        the weights of the lowest loss on the set-aside responses
    checkpoints/sft/done/           those that a first stage ended with
    learning_rate/train-start/      those that are tried, until a rate is chosen

Of a student that is sharded over ranks each writes and reads its own part, so that no rank holds the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from limbeck.training import checkpoints
from limbeck.training.background import Background, begin_or_do, on_host
from limbeck.training.checkpoint_files import (
    fault_of,
    is_on_cpu,
    is_sharded_model,
    require_parts,
    require_same,
    write_parts,
    write_whole,
)
from limbeck.training.checkpoint_shards import read_shards, shards_in
from limbeck.training.checkpoint_tensors import GATHERED, SCATTERED, once, put_weights_back, weight_parts
from limbeck.types import LimbeckError

_FILE = "model.safetensors"


def save(folder: Path, model: nn.Module) -> None:
    """Write the trained weights into a folder, in place of what is there; all ranks call, and wait for one another."""
    _save(folder, model, None, lambda: None)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _save(folder: Path, model: nn.Module, background: Background | None, after: Callable[[], None]) -> None:
    # A folder that is renamed is of another step.
    state, on_cpu = {"name": folder.name}, is_on_cpu(model)
    if is_sharded_model(model):
        kept = weight_parts(model)
        group = None if background is None else background.group
        copied = kept if background is None or on_cpu else on_host(kept)
        work = partial(write_parts, folder, copied, {}, state, after, group)
    else:
        # On an accelerator a copy on the host.
        gathered = get_model_state_dict(model, options=GATHERED)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        work = partial(write_whole, folder, {_FILE: once(gathered, model)}, state, after)
    begin_or_do(work, background, reads_weights=on_cpu)


def has(folder: Path) -> bool:
    """Whether the folder of `save` exists and is unchanged."""
    return fault_of(folder, (_FILE,), name=folder.name) is None


def restore(folder: Path, model: nn.Module) -> None:
    """Put the weights of `save` back, into a student that is sharded over any number of ranks or over none.

    Raises:
        LimbeckError: they are those of another student.
    """
    if is_sharded_model(model) or shards_in(folder):
        kept = weight_parts(model)
        require_parts(folder, kept)
        read_shards(folder, kept)
        put_weights_back(kept, model)
        return
    weights: dict[str, Any] = dict(load_file(folder / _FILE))
    require_same(folder, weights, model)
    set_model_state_dict(model, weights, options=SCATTERED)


def save_best(folder: Path, step: int, model: nn.Module, background: Background) -> None:
    """Keep the trained weights as the best so far, in place of those that no checkpoint names; all ranks call.

    Args:
        background: writes them beside what comes next.
    """
    best = checkpoints.best_path_of(folder, step)
    _save(best, model, background, partial(checkpoints.remove_unnamed, folder, best))


def restore_best(folder: Path, step: int, model: nn.Module) -> None:
    """Put the weights of `save_best` back. All ranks call, after they were written.

    Raises:
        LimbeckError: they are not what was written.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    best = checkpoints.best_path_of(folder, step)
    if not has(best):
        raise LimbeckError(
            f"{best}, the best student of the training, is missing or damaged; delete {folder} and run the same "
            "command again to train from the start"
        )
    restore(best, model)
