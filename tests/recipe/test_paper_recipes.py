"""The papers' tables as recipes: two steps of each on a tiny stand-in, and sweeps whose every run is a recipe."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from pathlib import Path

import pytest

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.files import shipped_recipes, shipped_sweeps
from limbeck.recipe.load import load_recipe, objective_of
from limbeck.runtime.files import read_json
from limbeck.sweep.arms import arms_of, final_runs, first_values, tuning_runs
from limbeck.sweep.settings import load_sweep
from tests.recipe.test_paper_headers import header
from tests.tiny_pair import questions, write_model, write_prompts
from tests.tiny_vision import write_questions, write_vision_model

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
        f"prompts.source={stand_in['folder'] / data}.jsonl",
        *SMALL,
    ]
    if recipe.student.init == "pretrained":
        changes.append(f"student.model={stand_in['student']}")
    if recipe.sft is not None:
        changes.append("sft.num_train_epochs=0.2")
    if recipe.train.lm is not None:
        changes += [f"train.lm.source={stand_in['folder'] / 'text.jsonl'}", "train.lm.max_length=16"]
    if recipe.preference is not None:
        changes += ["preference.max_steps=2", "preference.gradient_accumulation_steps=1", "preference.bf16=false"]
    if "tasks" in recipe.evaluate.groups:
        changes.append("evaluate.groups.tasks.max_new_tokens=8")
    if "speculation" in recipe.evaluate.groups:
        changes.append("evaluate.groups.speculation.prompts=2")
    return changes


def seeing(folder: Path) -> list[str]:
    """Two tiny models that read images, and questions in the columns of RLAIF-V."""
    pytest.importorskip("PIL", reason="images need Pillow: pip install 'limbeck[vision]'")
    asked = write_questions(folder, 16)
    rows = [json.loads(line) for line in asked.read_text("utf-8").splitlines()]
    write_prompts(asked, [row | {"chosen": "The better answer.", "rejected": "The other one."} for row in rows])
    teacher = write_vision_model(folder / "teacher", "llava", seed=1)
    student = write_vision_model(folder / "student", "llava", seed=2, patch=16)
    return [f"teacher.model={teacher}", f"student.model={student}", f"prompts.source={asked}"]


@pytest.mark.parametrize("name", PAPERS)
def test_two_steps_on_a_stand_in(name: str, stand_in: dict[str, Path], tmp_path: Path) -> None:
    as_shipped = load_recipe(name)
    if as_shipped.preference is not None:
        pytest.importorskip("trl", reason="preference tuning needs TRL: pip install 'limbeck[preference]'")
    images = seeing(tmp_path) if name == "papers/distillm2-table7" else []
    recipe = load_recipe(name, [*overrides(name, stand_in, tmp_path / "run"), *images])
    assert recipe.contrast == as_shipped.contrast and recipe.objective == as_shipped.objective
    assert recipe.student.quantize == as_shipped.student.quantize and recipe.student.lora == as_shipped.student.lora
    run = run_pipeline(recipe, stages=STAGES)
    assert read_json(run.root / "stages/train.json")["steps"] == 2
    assert read_json(run.root / "scores.json")["after"]["forward_kl"]["mean"] > 0
    assert (run.root / "preferred").exists() == (recipe.preference is not None)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_a_sweep_is_a_recipe(name: str) -> None:
    """What is tuned, with every value, and what is compared, with every seed."""
    sweep = load_sweep(name)
    for arm in arms_of(sweep):
        tuning = tuning_runs(sweep, arm, {})
        compared = final_runs(sweep, arm, first_values(sweep), {})
        assert len(tuning) == math.prod(map(len, sweep.tune.values())) * bool(sweep.tune)
        assert [run.recipe.train.seed for run in compared] == list(sweep.seeds)
        assert all(objective_of(run.recipe) for run in (*tuning, *compared))


def test_the_temperature_sweep_is_the_protocol_of_its_header() -> None:
    sweep = load_sweep("papers/temperature")
    recipes = [run.recipe for arm in arms_of(sweep) for run in tuning_runs(sweep, arm, {})]
    found = [
        (r.objective.name, r.objective.temperature, r.objective.temperature_scale, r.train.learning_rate)
        for r in recipes
    ]
    names = {"fkl", "rkl", "js", "skl", "srkl", "akl", "ab"}
    taus, rates = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0), sweep.tune["train.learning_rate"]
    assert set(found) == set(itertools.product(names, taus, ("none", "auto"), rates))
    assert len(found) == 8 * 6 * 2 * 3, "alpha-beta has two arms"
    assert len(rates) == 3 and sweep.tune_extend == 2 and len(sweep.seeds) == 3
    (compared,) = {run.recipe.prompts.split_seed for run in final_runs(sweep, arms_of(sweep)[0], {}, {})}
    assert {recipe.prompts.split_seed for recipe in recipes} == {1} and compared == 0
    assert sweep.tune_metric == "rouge_l_references"


def test_a_part_of_the_temperature_sweep_is_asked_for_as_its_header_says() -> None:
    said = re.search(r"About 50 of them: (sweep\..*) Command:", header("papers/temperature"))
    assert said
    sweep = load_sweep("papers/temperature", shlex.split(said[1]))
    assert [arm.name for arm in arms_of(sweep)] == [
        f"{name},temperature={tau}" for name in ("fkl", "rkl") for tau in (1, 2, 4)
    ]
    assert sweep.size == 24


def test_the_ablation_adds_a_part_in_each_arm() -> None:
    sweep = load_sweep("papers/distillm2-table5")
    by_name = {arm.name: final_runs(sweep, arm, {}, {})[0].recipe for arm in arms_of(sweep)}
    whole = load_recipe("papers/distillm2-table2")
    assert by_name["all"].contrast == whole.contrast
    sections = {name: recipe.contrast for name, recipe in by_name.items()}
    parts = {name: (c.student is not None, c.beta, c.rule is not None) for name, c in sections.items()}
    assert parts == {
        "distillm": (False, "none", False),
        "contrastive": (True, "constant", False),
        "contrastive-beta": (True, "sawtooth", False),
        "contrastive-alpha": (True, "constant", True),
        "all": (True, "sawtooth", True),
    }
