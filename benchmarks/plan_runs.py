"""Runs beside their plans: disk, the memory of each stage, and its time as a probe plans it.

    python -m benchmarks.plan_runs          # all of them, two processes each; those in runs/plan-runs are not repeated
    python -m benchmarks.plan_runs offline adapters

A process plans, with a probe of 20 seconds, and writes the plan down; another one runs. Disk is planned once more when
the run is over, since it depends on how long the answers became. Most are of a random pair of 6 and 4 blocks, width
256, 192 prompts, 80 steps of 4, answers of at most 48 tokens; two of SmolLM2 with 18 of its blocks, 48 prompts and 16
steps. Two have their teacher elsewhere, and train on answers of the data: its signals in a store, or its states from a
server, which is another process. Seconds are those of the clock, and of the processor: on a machine with other work the
second can be compared.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.models.devices import fleet_of
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.plan.disk import end_bytes, measured_bytes
from limbeck.pipeline.plan.outcome import plan
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.store_capture import capture
from limbeck.recipe.load import Recipe, load_recipe
from limbeck.runtime.console import QuietConsole
from limbeck.runtime.files import read_json, write_json
from tests.teachers.scoring_server import scoring_server
from tests.teachers.stripped_model import StrippedModel
from tests.tiny_pair import questions, write_model, write_prompts

OUT = Path("runs/plan-runs")
SECONDS = 20.0
OF_STUDENT = {"temperature": 1.0, "top_p": 1.0}
SMOLLM2: dict[str, Any] = {
    "teacher": {"model": "smollm2-135m-instruct"},
    "student": {"layers": 18},
    "prompts": {"source": "builtin", "limit": 48},
    "train": {"max_steps": 16},
}
SHAPE: dict[str, Any] = {"layers": 6, "width": 256, "window": 256, "seed": 1}
ELSEWHERE: dict[str, Any] = {
    "student": {"init": "pretrained", "layers": None},
    "responses": {"source": "data"},
    "evaluate": {"groups": ["fidelity"]},
}
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
    "stored teacher": ELSEWHERE,
    "served teacher": ELSEWHERE,
    "SmolLM2": SMOLLM2,
    "SmolLM2, adapters": SMOLLM2 | {"student": {"layers": 18, "lora": {"r": 16}}},
}


def tree_of(name: str, folder: Path) -> dict[str, Any]:
    """The recipe of a configuration, with its models and prompts written to a folder."""
    teacher = write_model(folder / "teacher", **SHAPE)
    rows = [{"prompt": text, "completion": f"{text} Here is what is known of it."} for text in questions(192)]
    write_prompts(folder / "prompts.jsonl", rows)
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
    if CONFIGURATIONS[name] is ELSEWHERE:
        tree["student"]["model"] = str(write_model(folder / "student", **{**SHAPE, "layers": 4}))
    elif tree["student"]["init"] == "pretrained":
        tree["student"] = {"init": "teacher"}
    return tree


@contextmanager
def recipe_of(name: str, folder: Path) -> Iterator[Recipe]:
    """The recipe of a configuration, its teacher in place, wherever that is."""
    tree = tree_of(name, folder)
    if name == "stored teacher":
        store = folder / "store"
        capture(load_recipe(tree | {"output_dir": str(folder / "capture")}), store, None, console=QuietConsole())
        tree["teacher"]["where"] = {"name": "store", "path": str(store)}
    if name != "served teacher":
        yield load_recipe(tree)
        return
    command = [sys.executable, "-m", "benchmarks.plan_runs", "serve", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None, "it is a pipe"
        here, url = server.stdout.readline().split()
        tree["teacher"] = {"model": here, "where": {"name": "server", "base_url": url}}
        try:
            yield load_recipe(tree)
        finally:
            server.terminate()


def serve(name: str) -> None:
    """Serve the states of a teacher, whose last norm and head alone are in the folder that is printed, until killed."""
    from tokenizers import Tokenizer

    folder = folder_of(name)
    (folder / "states").mkdir(exist_ok=True)
    shutil.rmtree(folder / "served", ignore_errors=True)
    model = StrippedModel(folder / "served", **SHAPE)
    with scoring_server(Tokenizer.from_file(str(model.folder / "tokenizer.json")), model.scores) as (handler, url, _):
        handler.states, handler.folder = staticmethod(model.states), folder / "states"
        print(model.folder, url, flush=True)
        threading.Event().wait()


def planned(name: str, folder: Path) -> dict[str, Any]:
    """The plan of a configuration: of each stage memory, and seconds of clock and processor."""
    with recipe_of(name, folder) as recipe:
        made = plan(recipe, fleet_of("cpu"), probe_s=SECONDS)
    processor = 1.0 if made.probe is None else made.probe.processor
    return {
        "mib": {stage.stage: stage.bytes >> 20 for stage in made.memory},
        "clock": {stage.stage: stage.seconds for stage in made.times},
        "cpu": {stage.stage: stage.seconds * processor for stage in made.times},
    }


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The same of its run, and bytes of disk, planned and there."""
    found: dict[str, Any] = {"clock": {}, "cpu": {}}
    stages = [replace(stage, run=_timed(stage.run, found, stage.name)) for stage in STAGES]
    with recipe_of(name, folder) as recipe:
        run = run_pipeline(recipe, stages=stages, console=QuietConsole())
        foreseen = end_bytes(plan(recipe, fleet_of("cpu")).disk)
    records = {path.stem: read_json(path) for path in (run.root / "stages").glob("*.json")}
    found["mib"] = {
        stage: record["peak_memory_mib"] for stage, record in records.items() if "peak_memory_mib" in record
    }
    return found | {"disk": (foreseen, measured_bytes(run.root))}


def _timed(run: Callable[[Any], Any], found: dict[str, Any], name: str) -> Callable[[Any], Any]:
    def timed(context: Any) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        record = run(context)
        found["clock"][name] = time.perf_counter() - clock
        found["cpu"][name] = time.process_time() - processor
        return record

    return timed


def main() -> None:
    names = sys.argv[1:] or list(CONFIGURATIONS)
    if names[0] == "serve":
        serve(names[1])
        return
    if names[0] in PARTS:
        part, name = names
        folder = folder_of(name)
        write_json(folder / f"{part}.json", PARTS[part](name, folder))
        return
    print("| run | disk | stage | MiB | seconds of the clock | of the processor |\n|---|---|---|---|---|---|")
    for name in names:
        before, after = (part_of(name, part) for part in PARTS)
        foreseen, there = after["disk"]
        disk = beside(foreseen / 1e6, there / 1e6, " MB")
        for number, stage in enumerate(before["clock"]):
            cells = [beside(before[what].get(stage), after[what].get(stage)) for what in ("mib", "clock", "cpu")]
            print(f"| {'' if number else name} | {'' if number else disk} | {stage} | {' | '.join(cells)} |")


def folder_of(name: str) -> Path:
    return OUT / name.replace(", ", "-").replace(" ", "-")


def part_of(name: str, part: str) -> dict[str, Any]:
    """The plan or the run of a configuration, in a process of its own where it is not there yet."""
    path = folder_of(name) / f"{part}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "benchmarks.plan_runs", part, name], check=True)
    return read_json(path)


def beside(planned: float | None, measured: float | None, unit: str = "") -> str:
    """Planned / measured, and by how much the plan is above."""
    if planned is None or not measured:
        return ""
    digits = 0 if measured > 300 else 1
    return f"{planned:,.{digits}f} / {measured:,.{digits}f}{unit} ({planned / measured - 1:+.0%})"


PARTS: Mapping[str, Callable[[str, Path], dict[str, Any]]] = {"planned": planned, "measured": measured}


if __name__ == "__main__":
    main()
