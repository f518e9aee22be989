"""Times that a probe plans, beside those of the runs right after it.

    python -m benchmarks.plan_time               # all of them, a process each; those in runs/plan-time are not repeated
    python -m benchmarks.plan_time offline lora

A random pair of 6 and 4 blocks, width 256, 192 prompts, 80 steps of 4, answers of at most 48 tokens. Seconds are those
of the clock, and of the processor: on a machine with other work the second are what can be compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.models.devices import fleet_of
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.plan.outcome import plan
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import QuietConsole
from tests.tiny_pair import questions, write_model, write_prompts

OUT = Path("runs/plan-time")
SECONDS = 8.0
OF_STUDENT = {"temperature": 1.0, "top_p": 1.0}
CONFIGURATIONS: Mapping[str, dict[str, Any]] = {
    "offline": {},
    "adapters": {"student": {"lora": {"r": 8}}},
    "whole teacher": {"student": {"init": "pretrained"}},
    "not stored": {"teacher": {"cache": False}},
    "cross-entropy": {"objective": {"name": "ce"}},
    "larger batch": {"train": {"per_device_train_batch_size": 16}},
    "mixed": {"responses": {"source": {"name": "mixed", "share": 0.5}}},
    "by step": {"responses": {"source": {"name": "student", "refresh": "step"}, **OF_STUDENT}},
    "by epoch": {"responses": {"source": {"name": "student", "refresh": "epoch"}, **OF_STUDENT}},
    "pairs": {
        "responses": {"source": {"name": "pairs", "refresh": "epoch"}},
        "contrast": {"student": {"name": "rkl"}},
    },
}


def tree_of(name: str, folder: Path) -> dict[str, Any]:
    """The recipe of a configuration, with its models and prompts written to a folder."""
    teacher = write_model(folder / "teacher", layers=6, width=256, window=256, seed=1)
    write_prompts(folder / "prompts.jsonl", [{"prompt": text} for text in questions(192)])
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "teacher": {"model": str(teacher)},
        "student": {"init": "depth_prune", "layers": 4},
        "prompts": {"source": str(folder / "prompts.jsonl"), "eval_fraction": 0.2},
        "responses": {"source": "teacher", "max_new_tokens": 48, "temperature": 1.0},
        "objective": {"name": "fkl", "temperature": 1.0},
        "train": {
            "num_train_epochs": 10,
            "max_steps": 80,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-4,
            "save_steps": 1000,
            "compile": "off",
        },
        "evaluate": {"groups": ["fidelity", "rouge"], "max_new_tokens": 48},
    }
    for section, changes in CONFIGURATIONS[name].items():
        tree[section] = {**tree[section], **changes} if section in tree else changes
    if tree["student"]["init"] == "pretrained":
        tree["student"] = {"init": "teacher"}
    return tree


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Each stage of a configuration: seconds planned, of the clock, and of the processor."""
    recipe = load_recipe(tree_of(name, folder))
    made = plan(recipe, fleet_of("cpu"), probe_s=SECONDS)
    planned = {stage.stage: stage.seconds for stage in made.times}
    processor = 1.0 if made.probe is None else made.probe.processor
    found: dict[str, Any] = {}
    stages = [replace(stage, run=_timed(stage.run, found, stage.name)) for stage in STAGES]
    run_pipeline(recipe, stages=stages, console=QuietConsole())
    return {
        stage: {"planned": seconds, "planned_cpu": seconds * processor, **found[stage]}
        for stage, seconds in planned.items()
    }


def _timed(run: Callable[[Any], Any], found: dict[str, Any], name: str) -> Callable[[Any], Any]:
    def timed(context: Any) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        record = run(context)
        found[name] = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - processor}
        return record

    return timed


def main() -> None:
    names = sys.argv[1:] or list(CONFIGURATIONS)
    if names[0] == "--one":
        folder = OUT / names[1].replace(" ", "-")
        (folder / "times.json").write_text(json.dumps(measured(names[1], folder)), "utf-8")
        return
    print("| run | stage | clock: planned / measured | processor: planned / measured |\n|---|---|---|---|")
    for name in names:
        times = OUT / name.replace(" ", "-") / "times.json"
        if not times.is_file():
            times.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", "benchmarks.plan_time", "--one", name], check=True)
        for stage, one in json.loads(times.read_text("utf-8")).items():
            pairs = [(one["planned"], one["clock"]), (one["planned_cpu"], one["cpu"])]
            said = [f"{planned:.1f} / {took:.1f} ({planned / took - 1:+.0%})" for planned, took in pairs]
            print(f"| {name} | {stage} | {said[0]} | {said[1]} |")


if __name__ == "__main__":
    main()
