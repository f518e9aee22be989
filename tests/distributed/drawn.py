"""Students that no files hold, tensor by tensor, as they begin: played by two ranks of a launch, and by one process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.models.slices import is_unread
from limbeck.training import sharding
from tests.distributed.recipes import play_recipe

LORA = "student.lora={r: 4, lora_alpha: 8}"
STUDENTS: Mapping[str, tuple[str, ...]] = {
    "fresh": ("student.init=scratch", "student.layers=null", "student.config={num_hidden_layers: 2}"),
    "fresh-adapters": (
        "student.init=scratch",
        "student.layers=null",
        "student.config={num_hidden_layers: 2}",
        "student.freeze_embeddings=true",
        LORA,
    ),
    "narrowed": ("student.init=width_prune", "student.width={intermediate_size: 32}"),
    "gguf": ("student.model={pair}/student.gguf", LORA),
    "experts": ("student.model={pair}/experts",),
    "on-grid": ("student.quantize={format: q4_0, grid: importance}",),
    "few-bits": ("student.quantize={format: q4_0, weights: frozen}", LORA),
    "images": (
        "teacher.model={pair}/seeing/teacher",
        "student.init=pretrained",
        "student.layers=null",
        "student.model={pair}/seeing/student",
        "prompts.source={pair}/seeing/questions.jsonl",
    ),
}


def play_student(name: str, pair: Path, folder: Path, *changes: str) -> Path:
    """Run the recipe `kd` with one of the students; returns the run directory."""
    own = [change.replace("{pair}", str(pair)) for change in STUDENTS[name]]
    return play_recipe("kd", pair, folder / name, *own, *changes)


def main() -> None:
    pair, folder, *changes = sys.argv[1:]
    read = sharding.read_parts
    for name in STUDENTS:
        by_slices: list[bool] = []

        def seen(student: nn.Module, device: Any, by_slices: list[bool] = by_slices) -> None:
            by_slices.append(is_unread(student))
            read(student, device)

        sharding.read_parts = seen
        run = play_student(name, Path(pair), Path(folder), *changes)
        assert by_slices[0], f"{name} was read whole"
        assert not (run / "checkpoints" / "start").exists()


if __name__ == "__main__":
    main()
