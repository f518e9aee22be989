"""The papers' tables as recipes: two steps of each on a tiny stand-in, and headers that say what was not run."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.files import shipped_recipes, shipped_sweeps
from limbeck.recipe.load import load_recipe
from limbeck.runtime.files import read_json
from limbeck.sweep.arms import arms_of, tuning_runs
from limbeck.sweep.settings import load_sweep
from tests.tiny_pair import questions, write_model

PAPERS = [name for name in shipped_recipes() if name.startswith("papers/")]
SWEEPS = [name for name in shipped_sweeps() if name.startswith("papers/")]
# Batches, lengths and data of a minute's size; everything that makes the method stays.
SMALL = (
    "prompts.limit=null",
    "prompts.dataset_config=null",
    "prompts.dataset_split=train",
    "prompts.eval_fraction=0.25",
    "responses.max_new_tokens=16",
    "responses.batch_size=8",
    "teacher.dtype=float32",
    "train.max_steps=2",
    "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=2",
    "train.bf16=false",
    "train.compile=off",
    "evaluate.max_new_tokens=8",
    "evaluate.samples=1",
)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models, and a row of data in which every recipe finds its fields."""
    folder = tmp_path_factory.mktemp("stand_in")
    rows = [{"instruction": text, "output": f"It is {n}."} for n, text in enumerate(questions())]
    maths = [{"query": text, "response": f"It is {n}."} for n, text in enumerate(questions())]
    gsm8k = [{"question": text, "answer": f"So.\n#### {n}"} for n, text in enumerate(questions())]
    for name, data in (("rows", rows), ("maths", maths), ("gsm8k", gsm8k)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), "utf-8")
    (folder / "text.jsonl").write_text('{"text": "Some text to learn from, and a little more."}\n' * 40, "utf-8")
    return {
        "teacher": write_model(folder / "teacher", window=256),
        "student": write_model(folder / "student", layers=2, seed=1, window=256),
        "folder": folder,
    }


def overrides(name: str, stand_in: dict[str, Path], output: Path) -> list[str]:
    recipe = load_recipe(name)
    data = "gsm8k" if recipe.prompts.task else "maths" if recipe.prompts.fields else "rows"
    changes = [
        f"output_dir={output}",
        f"teacher.model={stand_in['teacher']}",
        f"student.model={stand_in['student']}",
        f"prompts.source={stand_in['folder'] / data}.jsonl",
        *SMALL,
    ]
    if recipe.sft is not None:
        changes.append("sft.num_train_epochs=0.2")
    if recipe.train.lm is not None:
        changes += [f"train.lm.source={stand_in['folder'] / 'text.jsonl'}", "train.lm.max_length=16"]
    if "tasks" in recipe.evaluate.groups:
        changes.append("evaluate.groups.tasks.max_new_tokens=8")
    return changes


@pytest.mark.parametrize("name", PAPERS)
def test_two_steps_on_a_stand_in(name: str, stand_in: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(name, overrides(name, stand_in, tmp_path / "run"))
    as_shipped = load_recipe(name)
    assert recipe.contrast == as_shipped.contrast and recipe.objective == as_shipped.objective
    run = run_pipeline(recipe, stages=STAGES)
    assert read_json(run.root / "stages/train.json")["steps"] == 2
    assert read_json(run.root / "scores.json")["after"]["forward_kl"]["mean"] > 0


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_a_sweep_is_a_recipe(name: str) -> None:
    sweep = load_sweep(name)
    recipes = [run.recipe for arm in arms_of(sweep) for run in tuning_runs(sweep, arm, {})]
    found = {(r.objective.name, r.objective.temperature, r.train.learning_rate) for r in recipes}
    assert found == {
        (objective, tau, rate)
        for objective in ("fkl", "rkl")
        for tau in (1.0, 2.0, 4.0, 8.0)
        for rate in sweep.tune["train.learning_rate"]
    }


@pytest.mark.parametrize("name", [*PAPERS, *SWEEPS])
def test_the_header_says_what_it_would_take(name: str) -> None:
    text = (files("limbeck.recipe") / "shipped" / f"{name}.yaml").read_text("utf-8")
    header = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"Expected: not run here: needs about \d+ GPU hours", header)
    assert re.search(r"\(arXiv \d{4}\.\d{5}\)", header) and "The paper" in header
    assert f"papers/{name.rpartition('/')[2]}" in header.rpartition("Command:")[2]
