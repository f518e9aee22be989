"""What a recipe asks of a teacher that does not give it is refused before any stage works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.provisions import check_provisions
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import as_tree, json_schema, load_recipe
from limbeck.runtime.files import read_json
from limbeck.teachers.registry import TEACHERS
from limbeck.types import LimbeckError
from tests.teachers.test_from_outside import Uniform
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": text, "completion": f"An answer to {text}"} for text in questions()]
    return TinyPair(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl", rows))


@pytest.fixture(autouse=True)
def uniform() -> Iterator[None]:
    TEACHERS.register("uniform", Uniform)
    yield
    TEACHERS.unregister("uniform")


def tree_of(tiny: TinyPair, output: Path, where: str, sections: dict[str, Any]) -> dict[str, Any]:
    """A run on the data's answers that asks its teacher for nothing but distributions."""
    alone = {"student": {"init": "pretrained", "layers": None, "model": str(tiny.teacher)}}
    base = {"responses": {"source": "data"}, "evaluate": {"groups": ["fidelity"]}, **alone}
    tree = tiny.tree(output, **base | {"teacher": {"where": where}} | sections)
    tree["teacher"]["where"] = where
    return tree


@pytest.mark.parametrize(
    ("where", "sections", "parts"),
    [
        ("uniform", {"responses": {"source": "teacher"}}, ("responses.source=teacher", "answers", "source=data")),
        ("uniform", {"responses": {"source": "speculative"}}, ("answers", "responses.source")),
        ("uniform", {"student": {"init": "depth_prune", "layers": 2}}, ("student.init=depth_prune", "student.model")),
        ("uniform", {"evaluate": {"groups": ["rouge"]}}, ("evaluate.groups.rouge", "against=[references]")),
        ("uniform", {"evaluate": {"groups": ["cost"]}}, ("evaluate.groups.cost", "leave it out")),
        ("uniform", {"evaluate": {"groups": ["speculation"]}}, ("evaluate.groups.speculation", "leave it out")),
        ("none", {}, ("teacher.cache=true", "gives nothing", "teacher.cache=false")),
        ("none", {"teacher": {"cache": False}}, ("objective fkl", "distributions", "objective={name: ce}")),
        (
            "none",
            {"teacher": {"cache": False}, "objective": {"name": "ce", "temperature": 1.0}},
            ("evaluate.groups.fidelity", "distributions", "in_process"),
        ),
    ],
)
def test_what_a_teacher_lacks_is_named_with_a_remedy(
    tiny: TinyPair, tmp_path: Path, where: str, sections: dict[str, Any], parts: tuple[str, ...]
) -> None:
    recipe = load_recipe(tree_of(tiny, tmp_path / "run", where, sections))
    with pytest.raises(LimbeckError) as error:
        run_pipeline(recipe, stages=STAGES)
    message = str(error.value)
    assert "\n" not in message and f"teacher.where={where}" in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run" / "prompts.jsonl").exists()


def test_what_it_gives_is_not_refused(tiny: TinyPair, tmp_path: Path) -> None:
    check_provisions(RunContext(load_recipe(tree_of(tiny, tmp_path / "run", "uniform", {}))))


def test_a_student_learns_from_the_data_without_a_teacher(tiny: TinyPair, tmp_path: Path) -> None:
    sections = {
        "teacher": {"cache": False},
        "objective": {"name": "ce", "temperature": 1.0},
        "evaluate": {"groups": {"rouge": {"against": ["references"]}, "nll": {"whose": "references"}}},
        "train": {"max_steps": 2},
    }
    run = run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run", "none", sections)), stages=STAGES)
    after = read_json(run.root / "scores.json")["after"]
    assert "rouge_l_references" in after and "teacher_rouge_l_references" not in after
    assert (run.root / "report.html").exists() and (run.student / "model.safetensors").exists()


def test_the_schema_and_the_printed_recipe_know_the_members(tiny: TinyPair, tmp_path: Path) -> None:
    schemas = json_schema()["$defs"]["TeacherSection"]["properties"]["where"]["anyOf"]
    assert schemas[0]["enum"] == list(TEACHERS)
    (own,) = (schema for schema in schemas if schema.get("title") == "uniform")
    assert own["properties"]["width"]["default"] == 4 and own["required"] == ["name"]
    recipe = load_recipe(tree_of(tiny, tmp_path / "run", "uniform", {}))
    assert as_tree(recipe)["teacher"]["where"] == {"name": "uniform", "width": 4}
    assert load_recipe(as_tree(recipe)) == recipe
    changed = load_recipe(as_tree(recipe), ["teacher.where.width=6"])
    assert changed.teacher.where == Uniform(width=6)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("teacher.where=7", ("teacher.where is 7", "in_process")),
        ("teacher.where={name: uniform, with: 3}", ("'teacher.where.with'", "did you mean 'teacher.where.width'")),
        ("teacher.where.width=3", ("teacher.where.width is an option of uniform, not in_process",)),
    ],
)
def test_a_wrong_place_is_refused_in_one_line(
    tiny: TinyPair, tmp_path: Path, override: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(LimbeckError) as error:
        load_recipe(tiny.tree(tmp_path / "run"), [override])
    assert all(part in str(error.value) for part in parts), str(error.value)
