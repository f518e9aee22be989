"""What the checks before the training warn of and refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.models.devices import fleet_of
from limbeck.pipeline.checks import check_responses, check_student
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan.outcome import plan
from limbeck.recipe.load import Recipe, load_recipe
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair, write_model, write_prompts

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("family", "student", "experts"),
    [("mixtral", {}, 8), ("qwen3_moe", {}, 128), ("mixtral", {"lora": ATTENTION}, 0), ("llama", {}, 0)],
)
def test_a_mixture_of_experts_is_trained_without_its_balancing_loss(
    family: str, student: dict[str, Any], experts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    pair = TinyPair(teacher=write_model(tmp_path / "teacher", family=family, width=16, layers=3), prompts=prompts)
    check_student(RunContext(load_recipe(pair.tree(tmp_path / "run", student=student))))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    warned = f"warning: the student is a mixture of {experts} experts, and the loss that spreads tokens evenly"
    assert [line[: len(warned)] for line in said] == ([warned] if experts else [])


@pytest.mark.parametrize(
    ("family", "format", "warned"),
    [("mistral", "q4_0", True), ("mistral", "int4_g32", False), ("llama", "q4_0", False)],
)
def test_a_student_on_the_grid_of_a_file_that_it_cannot_become_is_warned_of(
    family: str, format: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    pair = TinyPair(teacher=write_model(tmp_path / "teacher", family=family), prompts=prompts)
    tree = pair.tree(tmp_path / "run") | {"student": {"init": "teacher", "quantize": {"format": format}}}
    check_student(RunContext(load_recipe(tree)))
    said = capsys.readouterr().err
    assert ("the student will not become a GGUF file: mistral models cannot be exported" in said) is warned


def check(recipe: Recipe) -> None:
    context = RunContext(recipe)
    check_responses(context)
    check_student(context)


def planned(recipe: Recipe) -> None:
    plan(recipe, fleet_of("cpu"))


DOORS = pytest.mark.parametrize("door", [check, planned])


@DOORS
@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"layers": 9}, r"student\.layers is 9; .*teacher has 3 blocks, so expected 2 to 2"),
        ({"layers": None, "keep": [0, 7]}, r"student\.keep is \[0, 7\]; .*teacher has 3 blocks, so expected ascending"),
    ],
)
def test_a_plan_refuses_the_depths_that_a_run_refuses(
    door: Callable[[Recipe], None], student: dict[str, Any], said: str, tiny: TinyPair, tmp_path: Path
) -> None:
    with pytest.raises(LimbeckError, match=said):
        door(load_recipe(tiny.tree(tmp_path / "run", student=student)))


@DOORS
@pytest.mark.parametrize("made", [[], ["lab/task-teacher"]])
def test_models_of_shipped_recipes_are_made_first(
    door: Callable[[Recipe], None], made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in made:
        (load_recipe(name).directory / "student").mkdir(parents=True)
    lacking = [name for name in ("lab/task-student", "lab/task-teacher") if name not in made]
    first = lacking[0]
    with pytest.raises(LimbeckError) as caught:
        door(load_recipe("lab/task"))
    commands = " and ".join(f"`limbeck run {name}`" for name in lacking)
    assert str(caught.value) == (
        f"no model 'runs/{first.replace('/', '-')}/student': it is the student of the shipped recipe {first}, which "
        f"has not been run here; run {commands} first"
    )
