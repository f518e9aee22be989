"""One of two processes: plays the scenarios of test_two_processes.py and writes down how each ended; then those of
test_sharded.py, in which the student is sharded over the two.

RANK=0 WORLD_SIZE=2 ... python -m tests.distributed.worker FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from limbeck.models.whole import keep_copy, whole, whole_on_first_rank
from limbeck.objectives import build_objective
from limbeck.training.run import NonFiniteError
from limbeck.types import Interrupted
from tests.distributed.authors import SCENARIOS, play_author
from tests.distributed.updates import EXACT, UPDATES, kept_bytes, play_update, uneven
from tests.training.play import (
    FailingTeacher,
    play,
    play_evaluated,
    settings,
    stop_after,
    tiny_lora,
    tiny_model,
    tiny_teacher,
    weights,
)

RANK = int(os.environ["RANK"])


def interrupted(folder: Path, make: Callable[[], nn.Module], **changes: Any) -> nn.Module:
    """Rank 1 alone is asked to stop; both must, and both continue."""
    chosen = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2, **changes)
    try:
        play(make(), folder, chosen, should_stop=stop_after(3) if RANK == 1 else lambda: False)
    except Interrupted as stop:
        assert "after step 3 of 5" in str(stop)
        return play(make(), folder, chosen)
    raise AssertionError("no rank stopped")


def poisoned(folder: Path, **changes: Any) -> str:
    """The teacher of rank 1 alone says NaN in the third step; no rank may update."""
    chosen = settings(per_device_train_batch_size=4, save_steps=1, **changes)
    student = tiny_model(1)
    try:
        play(student, folder, chosen, teacher=FailingTeacher(2 if RANK == 1 else 100, nan=True))
    except NonFiniteError as error:
        keep(student, folder)
        return str(error)
    raise AssertionError("NaN went through")


def ruined(folder: Path, **changes: Any) -> nn.Module:
    """A rate at which every step does harm: the student as it was before, of which each rank kept its part, is put
    back."""
    harm = {"learning_rate": 1.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    return play_evaluated(folder, settings(per_device_train_batch_size=4, eval_steps=2, **harm, **changes))


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def gathered(folder: Path) -> None:
    """The first rank alone gets the whole weights of a sharded model, in files."""
    model = uneven()
    keep_copy(model, torch.device("cpu"))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with whole_on_first_rank(model, folder / "files") as copied:
        if RANK:
            assert not any(weight.numel() for weight in copied.parameters())
        else:
            assert len([*folder.glob("files/*")]) == len([*model.parameters()])
            save_file(weights(copied), folder / "model.safetensors")


def keep(student: nn.Module, folder: Path) -> None:
    """Write the whole weights of each rank."""
    with whole(student) as model:
        save_file(weights(model), folder / f"rank{RANK}.safetensors")


def play_all(folder: Path, model: Path, names: Iterable[str], **changes: Any) -> None:
    def dropout() -> nn.Module:
        return tiny_lora(1, dropout=0.5)

    ends = {name: play_update(name, made(folder / name), model, ranks=2, **changes) for name in names}
    chosen = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2, **changes)
    ends["straight"] = play(dropout(), made(folder / "straight"), chosen)
    ends["continued"] = interrupted(made(folder / "continued"), dropout, **changes)
    narrow = settings(per_device_train_batch_size=4, bf16=True, **changes)
    ends["bf16"] = play(tiny_model(1), made(folder / "bf16"), narrow)
    ends["ruined"] = ruined(made(folder / "ruined"), **changes)
    wider = tiny_teacher(width=64, dtype=EXACT)
    hidden = build_objective("sum", parts=["fkl", "hidden"])
    chosen = settings(per_device_train_batch_size=4, **changes)
    ends["hidden"] = play(tiny_model(1, dtype=EXACT), made(folder / "hidden"), chosen, objective=hidden, teacher=wider)
    for name, student in ends.items():
        keep(student, folder / name)
    for name in SCENARIOS:
        student, written = play_author(name, made(folder / name), per_device_train_batch_size=4, **changes)
        keep(student, folder / name)
        (folder / name / f"written-rank{RANK}.json").write_text(json.dumps(written))
    messages = {"poisoned": poisoned(made(folder / "poisoned"), **changes)}
    (folder / f"messages-rank{RANK}.json").write_text(json.dumps(messages))


def main(folder: Path) -> None:
    model = folder / "model"
    play_all(folder, model, UPDATES)
    with kept_bytes() as kept:
        play_all(made(folder / "sharded"), model, UPDATES, sharding="full")
    gathered(made(folder / "gathered"))
    (folder / "sharded" / f"bytes-rank{RANK}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
