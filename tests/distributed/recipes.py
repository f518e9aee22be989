"""Shipped recipes on a tiny pair, in this process or as a rank of a launch: one after another, in few steps.

python -m torch.distributed.run ... -m tests.distributed.recipes PAIR FOLDER KEY=VALUE ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe

# Responses of the teacher, of a mixture, of both side by side, of both models together; of a student in few bits.
NAMES = ("kd", "gkd", "distillm2", "skd", "recover")
OWN = {
    "recover": (
        "student.layers=null",
        "responses.source=student",
        "train.eval_steps=null",
        "train.per_device_train_batch_size=4",
    )
}


def play_recipe(name: str, pair: Path, folder: Path, *changes: str) -> Path:
    """Run a shipped recipe on the pair to its end, with steps of four responses; returns the run directory."""
    recipe = load_recipe(
        name,
        [
            f"output_dir={folder / name}",
            f"teacher.model={pair / 'teacher'}",
            f"prompts.source={pair / 'prompts.jsonl'}",
            "prompts.eval_fraction=0.25",
            "student.layers=2",
            "responses.max_new_tokens=12",
            "responses.batch_size=4",
            "train.max_steps=4",
            "train.warmup_steps=1",
            "train.learning_rate=1e-4",
            "train.compile=off",
            "evaluate.groups=[fidelity]",
            "evaluate.max_new_tokens=8",
            *OWN.get(name, ()),
            *changes,
        ],
    )
    return run_pipeline(recipe, stages=STAGES).root


if __name__ == "__main__":
    pair, folder, *changes = sys.argv[1:]
    for name in NAMES:
        play_recipe(name, Path(pair), Path(folder), *changes)
