"""Students that teach themselves: base, live and ema as the training asks them, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from limbeck.models import loading
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.training import checkpoints
from limbeck.types import LimbeckError
from tests.limbeck_command import CommandServer, KillAt
from tests.recovery.conftest import measured
from tests.tiny_pair import TinyPair, write_recipe

SYSTEM = {"name": "system", "text": "Be short."}


def tree_of(tiny: TinyPair, output: Path, model: str, **sections: Any) -> dict[str, Any]:
    """A run in which a model teaches itself what it would say under a system prompt."""
    teacher = {"model": model, "sees": SYSTEM, "cache": False, **sections.pop("teacher", {})}
    student = {"init": "pretrained", "layers": None, "model": str(tiny.teacher), **sections.pop("student", {})}
    base: dict[str, Any] = {"responses": {"source": "student"}, "evaluate": {"groups": ["fidelity"]}}
    tree = tiny.tree(output, teacher=teacher, student=student, **base | sections)
    tree["teacher"]["sees"] = teacher["sees"]
    tree["train"] |= {"max_steps": 4, "learning_rate": 3e-3, **sections.get("train", {})}
    return tree


def played(tree: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
    recipe = load_recipe(tree)
    run_pipeline(recipe, stages=STAGES)
    return recipe.directory, measured(recipe.directory)


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def runs(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The metrics of the same training under each teacher."""
    folder = tmp_path_factory.mktemp("itself")
    found = {}
    for name, teacher in {
        "named": {"model": str(tiny.teacher)},
        "base": {},
        "live": {},
        "ema": {},
        "stays": {"model": "ema", "ema_decay": 1.0},
        "moves": {"model": "ema", "ema_decay": 0.0},
    }.items():
        found[name] = played(tree_of(tiny, folder / name, str(teacher.pop("model", name)), teacher=teacher))[1]
    return found


def test_the_base_is_the_model_that_the_student_begins_as(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert runs["base"] == runs["named"]


def test_an_average_that_never_moves_is_the_base_and_one_that_keeps_nothing_is_the_student(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    """Bit for bit: the two ends of the decay."""
    assert runs["stays"] == runs["base"]
    assert runs["moves"] == runs["live"]


def test_all_begin_as_one_and_part(runs: dict[str, list[dict[str, Any]]]) -> None:
    first = {name: losses(lines)[0] for name, lines in runs.items()}
    assert len(set(first.values())) == 1 and first["live"] > 1e-3
    assert len({tuple(losses(runs[name])) for name in ("base", "live", "ema")}) == 3


def test_the_base_under_adapters_is_never_loaded_and_says_what_a_copy_says(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = loading.load_model

    def counted(name: str | Path, **options: Any) -> loading.LoadedModel:
        read.append(str(name))
        return original(name, **options)

    student: dict[str, Any] = {"lora": {"r": 2}}
    named = played(tree_of(tiny, tmp_path / "named", str(tiny.teacher), student=student))
    tree = tree_of(tiny, tmp_path / "base", "base", student=student, responses={"source": "student"})
    recipe = load_recipe(tree)
    run_pipeline(recipe, stages=STAGES, until="teach")
    monkeypatch.setattr(loading, "load_model", counted)
    run_pipeline(recipe, stages=STAGES, until="train")
    assert not read
    assert measured(recipe.directory) == named[1]
    weights = [root / "student/model.safetensors" for root in (recipe.directory, named[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("model", ["ema", "live"])
def test_what_moves_goes_on_as_it_was_after_kill_nine(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, model: str
) -> None:
    sections: dict[str, Any] = {"responses": {"source": "pairs"}, "train": {"save_steps": 2, "max_steps": 6}}
    whole = tree_of(tiny, tmp_path / "whole", model, **sections)
    _, lines = played(whole)
    run = tmp_path / "killed"
    recipe = write_recipe(tmp_path / "killed.yaml", tree_of(tiny, run, model, **sections))
    moments = [("checkpoints/step-000002", 0), ("checkpoints/.step-000004.partial/state.json", 0), ("student", 0)]
    for name, before in moments:
        killed = limbeck.run("run", recipe, killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed)
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    assert measured(run) == lines
    for name in ("student/model.safetensors", "scores.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_damaged_average_is_passed_over_with_its_checkpoint(tiny: TinyPair, tmp_path: Path) -> None:
    tree = tree_of(tiny, tmp_path / "run", "ema", train={"save_steps": 2})
    root, _ = played(tree)
    folder = root / "checkpoints"
    newest = checkpoints.usable(folder)
    assert newest is not None and checkpoints.usable(folder) == newest
    path = newest / "average.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert checkpoints.usable(folder) != newest


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("live", {"teacher": {"sees": "prompt"}}, "the two are one in every step"),
    ("base", {"teacher": {"sees": "prompt"}}, "the gradient of objective fkl is zero"),
    ("ema", {"teacher": {"sees": "prompt"}}, "the gradient of objective fkl is zero"),
    ("live", {"teacher": {"cache": True}}, "set teacher.cache=false"),
    ("ema", {"teacher": {"cache": True, "support": "topk_tail"}}, "teacher.cache=false and teacher.support=full"),
    ("base", {"student": {"init": "depth_prune", "layers": 2}}, "student.init=depth_prune makes"),
    ("base", {"student": {"init": "teacher", "model": None}}, "student.init=teacher makes"),
    ("base", {"student": {"model": None}}, "student.model is missing"),
    ("base", {"teacher": {"revision": "main"}}, "set student.revision instead"),
    ("base", {"teacher": {"ema_decay": 0.9}}, "teacher.ema_decay is of teacher.model=ema"),
    ("live", {"teacher": {"where": "none"}}, "remove teacher.where"),
    ("ema", {"student": {"quantize": {"format": "q8_0"}}}, "keeps them on a grid"),
]


@pytest.mark.parametrize(("model", "sections", "message"), REFUSED)
def test_what_is_impossible_is_refused_in_one_line(
    tiny: TinyPair, tmp_path: Path, model: str, sections: dict[str, Any], message: str
) -> None:
    tree = tree_of(tiny, tmp_path / "run", model, **json.loads(json.dumps(sections)))
    with pytest.raises(LimbeckError) as caught:
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "responses").exists()


def test_a_student_with_labels_may_be_held_to_its_start(tiny: TinyPair, tmp_path: Path) -> None:
    """Cross-entropy moves it, the divergence holds it back: the same prompt on both sides is no mistake there."""
    parts = [{"name": "ce", "weight": 1.0}, {"name": "fkl", "weight": 1.0}]
    objective = {"name": "sum", "parts": parts}
    tree = tree_of(tiny, tmp_path / "run", "base", teacher={"sees": "prompt"}, objective=objective)
    _, lines = played(tree)
    assert lines[0]["loss/fkl"] == pytest.approx(0, abs=1e-6) and lines[-1]["loss/fkl"] > 1e-4
