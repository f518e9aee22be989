"""Problems that a program makes: right answers, the same ones each time, and a run on them."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest

from limbeck.evaluation.tasks.generators import GENERATORS, ChainedSums
from limbeck.evaluation.tasks.problems import TaskName, problem_of
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import as_tree, load_recipe
from limbeck.runtime.files import read_json
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair, write_model, write_prompts


@pytest.mark.parametrize("name", list(GENERATORS))
def test_rows_are_problems_of_the_task_and_the_same_each_time(name: str) -> None:
    generator = GENERATORS[name]()
    assert generator.task in get_args(TaskName)
    first, again = (list(islice(generator.rows(), 200)) for _ in range(2))
    assert first == again
    problems = [problem_of(generator.task, row, f"row {n}", n) for n, row in enumerate(first, start=1)]
    assert all(problem.answer and problem.solution and problem.request for problem in problems)
    assert len({problem.id for problem in problems}) == 200


@pytest.mark.parametrize("modulus", [2, 10, 97])
def test_chains_are_worked_out_line_by_line(modulus: int) -> None:
    """Each line of an answer has the value of the question, by Python's own arithmetic, and one number less."""
    for row in ChainedSums(count=300, shortest=2, longest=6, modulus=modulus, seed=3).rows():
        lines = row["question"].splitlines() + row["answer"].removesuffix("\n").splitlines()
        result = lines.pop().removeprefix("#### ")
        values = [eval(line, {"__builtins__": {}}) % modulus for line in [*lines, result]]
        assert len(set(values)) == 1
        numbers = [len(re.findall(r"\d+", line)) for line in [*lines, result]]
        assert numbers == list(range(numbers[0], 0, -1))


def tree_of(tiny: TinyPair, output: Path, **generate: Any) -> dict[str, Any]:
    tree = tiny.tree(output, responses={"source": "data", "max_new_tokens": 40}, train={"max_steps": 2})
    tree["prompts"] = {"generate": {"name": "chain", "count": 60, **generate}, "eval_fraction": 0.3}
    tree["evaluate"]["groups"] = {"tasks": {"heldout": True, "by_category": True, "max_new_tokens": 8}}
    return tree


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("pair")
    return TinyPair(write_model(folder / "teacher"), write_prompts(folder / "prompts.jsonl"))


def test_a_run_on_generated_problems(tiny: TinyPair, tmp_path: Path) -> None:
    recipe = load_recipe(tree_of(tiny, tmp_path / "run", shortest=3, longest=4))
    assert load_recipe(as_tree(recipe)) == recipe
    run = run_pipeline(recipe, stages=STAGES)
    counts = read_json(run.root / "stages/prompts.json")
    assert counts["rows"] == 60 and counts["train"] + counts["heldout"] + counts["duplicates"] == 60
    after = read_json(run.root / "scores.json")["after"]
    by_size = {name: score for name, score in after.items() if "," in name}
    assert list(by_size) == ["accuracy@heldout,2 steps", "accuracy@heldout,3 steps"]
    assert sum(score["n"] for score in by_size.values()) == after["accuracy@heldout"]["n"] == counts["heldout"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"shortest": 5, "longest": 4}, ("longest is 4", "shortest, 5", "raise it")),
        ({"name": "chains"}, ("prompts.generate", "'chains' is unknown", "nearest: 'chain'")),
        ({"lenght": 4}, ("prompts.generate.lenght", "shortest, longest")),
        ({"modulus": 1}, ("modulus",)),
    ],
)
def test_wrong_generators_are_refused_in_one_line(
    tiny: TinyPair, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(LimbeckError) as error:
        load_recipe(tree_of(tiny, tmp_path / "run", **changes))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


def test_a_generator_beside_a_source_is_refused(tiny: TinyPair, tmp_path: Path) -> None:
    tree = tree_of(tiny, tmp_path / "run")
    tree["prompts"]["source"] = "data.jsonl"
    with pytest.raises(LimbeckError, match=r"prompts.generate makes the prompts, but prompts.source is 'data.jsonl'"):
        load_recipe(tree)
