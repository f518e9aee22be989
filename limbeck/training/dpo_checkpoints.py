"""Checkpoints of preference tuning: folders of the transformers Trainer in which nothing is pickled.

    checkpoint-50/  model.safetensors  optimizer.safetensors  scheduler.json  trainer_state.json  sealed.json

The Trainer writes a folder file by file, so `sealed.json`, with the hash of every other file, comes last: a folder
without it, or that is not what it says, is passed over for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from limbeck.runtime.files import read_json, write_json
from limbeck.runtime.folders import remove
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import read_sealed, sealed
from limbeck.types import LimbeckError

_SEAL, _OPTIMIZER, _SCHEDULER = "sealed.json", "optimizer.safetensors", "scheduler.json"


def saved_step(path: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(path.name.removeprefix("checkpoint-"))


def seal(path: Path, *, keep: int) -> None:
    """Say that a checkpoint is whole, then remove all but the newest `keep` whole ones and what is none."""
    files = {file.name: sha256_of(file) for file in sorted(path.iterdir()) if file.is_file() and file.name != _SEAL}
    write_json(path / _SEAL, sealed({"step": saved_step(path), "files": files}))
    every = sorted(path.parent.glob("checkpoint-*"), key=saved_step)
    whole = [one for one in every if (one / _SEAL).exists() and saved_step(one) <= saved_step(path)]
    for old in every:
        if old not in whole[-keep:]:
            remove(old)


def last_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The last checkpoint that is what was written.

    Args:
        warn: called with each sealed one that is passed over; one without a seal is what a kill left.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=saved_step, reverse=True):
        if not (path / _SEAL).exists():
            continue
        if (fault := _fault(path)) is None:
            return path
        warn(f"the checkpoint {path} is damaged ({fault}); it is passed over for the one before it, or for the start")
    return None


def _fault(path: Path) -> str | None:
    try:
        record = read_sealed(path / _SEAL)
        files = record["files"]
        return next((f"{n} is not what was written" for n in files if sha256_of(path / n) != files[n]), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (LimbeckError, OSError, KeyError, TypeError):
        return f"{_SEAL} cannot be read"


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Write the moments as safetensors and the place of the schedule as JSON."""
    state: dict[int, dict[str, torch.Tensor]] = optimizer.state_dict()["state"]
    moments = {f"{index}.{key}": value.contiguous() for index, own in state.items() for key, value in own.items()}
    save_file(moments, path / _OPTIMIZER)
    # The schedule itself is a function, made again from the settings; the optimizer's groups are these settings too.
    plain = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    write_json(path / _SCHEDULER, plain)


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Put back what `save_optimizer` wrote into an optimizer and a schedule of the same settings."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(path / _OPTIMIZER).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    place = read_json(path / _SCHEDULER)
    scheduler.load_state_dict(place | {"lr_lambdas": [None] * len(place["base_lrs"])})
    for group, rate in zip(optimizer.param_groups, place["_last_lr"], strict=True):
        group["lr"] = rate
