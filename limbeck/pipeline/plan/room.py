"""Refusal of a run whose disk or memory cannot hold it, before it works for hours.

Only what is certain is refused: what the run must write whatever is in its texts, and what a training must hold
whatever its batches are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from limbeck.models.devices import DEVICES, Fleet
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan.case import Case, case_of
from limbeck.pipeline.plan.disk import Part, disk_of, measured_bytes
from limbeck.pipeline.plan.memory import least
from limbeck.pipeline.plan.page import size
from limbeck.pipeline.plan.workload import Texts, Workload
from limbeck.pipeline.store_estimate import lengths_of
from limbeck.prompts.io import StoredPrompts
from limbeck.recipe.load import Recipe
from limbeck.runtime.memory import machine_memory
from limbeck.teachers.in_process import InProcess
from limbeck.types import LimbeckError

# Parts of a run's disk and the folders or files that hold what of them is written already.
_PLACES = {"signal": "signal", "checkpoints": "checkpoints", "student": "student"}


def require_room(context: RunContext, *, reading: bool = True) -> None:
    """See that a run will have the disk and the memory that it cannot do without, as far as that is known by now.

    Args:
        reading: whether the texts that are on disk are read; before the run's files were checked they may be damaged,
            and count as none.

    Raises:
        LimbeckError: it will not; names what takes most and what to change.
    """
    case = _known_case(context, reading)
    if case is None:
        return
    require_memory(context, case)
    require_disk(case, context.run.root, signal=not context.run.done("teach"))


def _known_case(context: RunContext, reading: bool) -> Case | None:
    """The run by what is on disk of it; None where nothing is left to train, or nothing is known of its models."""
    if context.run.done("train") or not context.wants("train"):
        return None
    nothing = Texts(count=0, tokens=0, ids=0, longest=0)
    work = _known_work(context) if reading else Workload(train=nothing, heldout=nothing, exact=False)
    return case_of(context, work, _ranks(context))


def _ranks(context: RunContext) -> Fleet:
    return Fleet(name="cpu", count=context.launch.ranks, device=DEVICES.build("cpu"))


def _known_work(context: RunContext) -> Workload:
    """The texts that are on disk; prompts without answers count as empty ones."""
    if context.run.done("respond") and not context.recipe.on_policy:
        lengths, _ = lengths_of(context)
        return Workload(train=Texts.of(lengths["train"]), heldout=Texts.of(lengths["heldout"]), exact=True)
    counts = {"train": 0, "heldout": 0}
    if context.run.done("prompts"):
        for prompt in StoredPrompts(context.run.prompts):
            counts[prompt.split] += 1
    sides = {side: Texts(count=n, tokens=0, ids=0, longest=0) for side, n in counts.items()}
    return Workload(train=sides["train"], heldout=sides["heldout"], exact=False)


def require_disk(case: Case, root: Path, *, signal: bool) -> None:
    """See that the disk has room for what a run is sure to write.

    Args:
        signal: whether the teacher's signal is still to be written.

    Raises:
        LimbeckError: it has not.
    """
    parts = [part for part in disk_of(case) if _is_certain(part, case, signal)]
    needed = sum(max(part.most - _there(root, part.name), 0) for part in parts)
    free = shutil.disk_usage(_existing(root)).free
    if needed > free:
        largest = max(parts, key=lambda part: part.most)
        raise LimbeckError(
            f"this run will write {size(needed)} and the disk of {root} has {size(free)} free "
            f"({_listed(parts)}); {_disk_remedy(case, largest)}, or name another disk with output_dir=..."
        )


def _is_certain(part: Part, case: Case, signal: bool) -> bool:
    if part.name == "signal":
        # States that were kept while the teacher wrote are there.
        return signal and part.known and not case.captures
    return part.name in ("checkpoints", "student")


def _there(root: Path, name: str) -> int:
    folder = root / _PLACES[name]
    return measured_bytes(folder) if folder.is_dir() else 0


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _listed(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.name} {size(part.most)}" for part in sorted(parts, key=lambda part: -part.most))


def _disk_remedy(case: Case, largest: Part) -> str:
    recipe = case.recipe
    if largest.name == "signal":
        if recipe.teacher.support == "full":
            return "set teacher.support=topk_tail, which keeps the likeliest tokens alone, or teacher.cache_limit_gib"
        return "lower teacher.support_k, or set teacher.cache_limit_gib"
    if largest.name == "checkpoints" and recipe.train.save_total_limit > 1:
        return "set train.save_total_limit=1"
    if largest.name == "checkpoints":
        return "raise train.save_steps above the number of steps, which keeps no checkpoint"
    return "take a smaller student"


def require_memory(context: RunContext, case: Case) -> None:
    """See that weights, gradients and moments of the student fit, and a teacher that is whole in this process.

    Raises:
        LimbeckError: they do not.
    """
    there, what = _memory(context)
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if context.device.type == "cpu" else 1
    needed = least(case) * shared
    if needed > there:
        raise LimbeckError(
            f"weights, gradients and moments of the student take {size(needed)} and {what} has {size(there)}; "
            f"{_memory_remedy(case.recipe)}"
        )
    if isinstance(context.recipe.teacher.where, InProcess) and context.recipe.teacher.where == InProcess():
        weights = case.teacher_bytes
        if weights > there:
            raise LimbeckError(
                f"the teacher's weights take {size(weights)} and {what} has {size(there)}; set "
                "teacher.where={name: server, base_url: ...}, so that a server has them, or a smaller "
                "teacher.dtype or teacher.bits"
            )


def _memory(context: RunContext) -> tuple[int, str]:
    """Bytes that there are, and where."""
    if context.device.type == "cuda":
        return torch.cuda.get_device_properties(context.device).total_memory, f"device {context.device}"
    import psutil

    return machine_memory() + psutil.swap_memory().total, "this machine"


def _memory_remedy(recipe: Recipe) -> str:
    if recipe.student.lora is None:
        return "train adapters (student.lora={r: 16}), or shard it over more ranks (train.sharding=full)"
    return "shard it over more ranks (train.sharding=full), or take a smaller student"
