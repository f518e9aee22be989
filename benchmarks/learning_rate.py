"""The searched learning rate beside a grid: one recipe on one pair, the same responses and blocks for all arms.

    python -m benchmarks.learning_rate kd teacher.model=MODEL student.layers=18
    options: --steps 60  --out DIR  --rates auto 1e-4 3e-4

Each rate is for the first stage too; with auto both have a search of their own. Prints the held-out forward KL before
and after, and how far each arm is from the best of the grid. Resumable: arms that are there are read.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.api import load
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.initial_student import build_initial_student
from limbeck.pipeline.stage_order import STAGES

GRID = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")


def main() -> None:
    parser = argparse.ArgumentParser(description="The searched learning rate beside a grid.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/learning-rate"))
    parser.add_argument("--rates", nargs="+", default=["auto", *GRID])
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, f"train.max_steps={arguments.steps}", "evaluate.groups=[fidelity]"]
    base = arguments.out / "base"
    run_pipeline(load(arguments.recipe, *overrides, f"output_dir={base}"), stages=STAGES, until="teach")
    overrides += _kept_blocks(arguments.recipe, overrides, base)
    arms = {rate: _arm(arguments.recipe, overrides, base, rate) for rate in arguments.rates}
    print(_table(arms))


def _kept_blocks(recipe: str, overrides: Sequence[str], base: Path) -> list[str]:
    """The blocks to keep, measured once for all arms; nothing where none are cut."""
    loaded = load(recipe, *overrides, f"output_dir={base}")
    if loaded.student.init != "depth_prune" or loaded.student.keep:
        return []
    measured = base.with_name("blocks")
    if not (measured / "blocks.json").exists():
        shutil.copytree(base, measured, dirs_exist_ok=True)
        build_initial_student(RunContext(load(recipe, *overrides, f"output_dir={measured}")))
    keep = json.loads((measured / "blocks.json").read_text("utf-8"))["keep"]
    return [f"student.keep={keep}", "student.layers=null"]


def _arm(recipe: str, overrides: Sequence[str], base: Path, rate: str) -> dict[str, Any]:
    """Scores of a run at one rate, and the rates that a search found."""
    folder = base.with_name(f"rate={rate}")
    if not folder.exists():
        shutil.copytree(base, folder)
    loaded = load(recipe, *overrides, f"output_dir={folder}", f"train.learning_rate={rate}")
    run_pipeline(loaded, stages=STAGES, until="evaluate")
    scores = json.loads((folder / "scores.json").read_text("utf-8"))
    searches = sorted((folder / "learning_rate").glob("*.json"))
    found = {path.stem: json.loads(path.read_text("utf-8"))["chosen"] for path in searches}
    return {side: scores[side]["forward_kl"]["mean"] for side in ("before", "after")} | {"found": found}


def _table(arms: dict[str, dict[str, Any]]) -> str:
    grid = [arm["after"] for rate, arm in arms.items() if rate != "auto"]
    lines = ["| rate | forward KL before | after | to the best of the grid |", "|---|---|---|---|"]
    for rate, arm in arms.items():
        named = rate + "".join(f", {stage} {found:.3g}" for stage, found in arm["found"].items())
        ratio = f"{arm['after'] / min(grid):.3f}" if grid else "-"
        lines.append(f"| {named} | {arm['before']:.4f} | {arm['after']:.4f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
