"""One of two processes: plays the scenarios of test_two_processes.py and writes down how each ended.

RANK=0 WORLD_SIZE=2 ... python -m tests.distributed.worker FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from limbeck.training.run import NonFiniteError
from limbeck.types import Interrupted
from tests.distributed.authors import SCENARIOS, play_author
from tests.distributed.updates import UPDATES, play_update
from tests.training.play import FailingTeacher, play, settings, stop_after, tiny_lora, tiny_model, weights

RANK = int(os.environ["RANK"])


def interrupted(folder: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """Rank 1 alone is asked to stop; both must, and both continue."""
    chosen = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    try:
        play(make(), folder, chosen, should_stop=stop_after(3) if RANK == 1 else lambda: False)
    except Interrupted as stop:
        assert "after step 3 of 5" in str(stop)
        return play(make(), folder, chosen)
    raise AssertionError("no rank stopped")


def poisoned(folder: Path) -> str:
    """The teacher of rank 1 alone says NaN in the third step; no rank may update."""
    chosen = settings(per_device_train_batch_size=4, save_steps=1)
    student = tiny_model(1)
    try:
        play(student, folder, chosen, teacher=FailingTeacher(2 if RANK == 1 else 100, nan=True))
    except NonFiniteError as error:
        save_file(weights(student), folder / f"rank{RANK}.safetensors")
        return str(error)
    raise AssertionError("NaN went through")


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def main(folder: Path) -> None:
    def dropout() -> nn.Module:
        return tiny_lora(1, dropout=0.5)

    ends = {name: play_update(name, made(folder / name), folder / "model", ranks=2) for name in UPDATES}
    chosen = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    ends["straight"] = play(dropout(), made(folder / "straight"), chosen)
    ends["continued"] = interrupted(made(folder / "continued"), dropout)
    for name, student in ends.items():
        save_file(weights(student), folder / name / f"rank{RANK}.safetensors")
    for name in SCENARIOS:
        student, written = play_author(name, made(folder / name), per_device_train_batch_size=4)
        save_file(weights(student), folder / name / f"rank{RANK}.safetensors")
        (folder / name / f"written-rank{RANK}.json").write_text(json.dumps(written))
    messages = {"poisoned": poisoned(made(folder / "poisoned"))}
    (folder / f"messages-rank{RANK}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
