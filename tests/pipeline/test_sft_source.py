"""A first stage that is taught from the data's own answers, while the training sees the teacher's."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import CommandServer, KillAt
from tests.pipeline.test_bad_input import refused
from tests.recovery.conftest import measured
from tests.tiny_pair import TinyPair, questions, write_prompts

SFT = {"source": "data", "num_train_epochs": 2.0}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answered(folder: Path, *, without: int = 0) -> str:
    """Prompts with answers; the first ones may have none."""
    rows = [{"prompt": q, "completion": f"It is {i}."} for i, q in enumerate(questions())]
    for row in rows[:without]:
        del row["completion"]
    return str(write_prompts(folder / "answered.jsonl", rows))


@pytest.mark.parametrize("author", ["teacher", "pairs"])
def test_each_stage_has_responses_of_its_own(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, author: str
) -> None:
    run = tmp_path / "run"
    sections = {"prompts": {"source": answered(tmp_path)}, "responses": {"source": author}, "sft": SFT}
    recipe = tiny.recipe(run, **sections)
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    taught, written = lines(run / "responses/sft.jsonl"), lines(run / "responses/teacher.jsonl")
    assert {r["author"] for r in taught} == {"data"} and {r["author"] for r in written} == {"teacher"}
    train = {r["prompt_id"] for r in written if r["split"] == "train"}
    assert {r["prompt_id"] for r in taught} == train, "held-out answers are not taught from"
    tokens = sum(len(r["response_ids"]) for r in taught)
    assert lines(run / "metrics.sft.jsonl")[-1]["tokens"] == 2 * tokens
    assert json.loads((run / "stages/respond.json").read_text())["sft"] == {
        "responses": len(taught),
        "tokens": tokens,
    }
    # Another answer of the data is another run; so is the source.
    refused(limbeck.run("run", recipe, "sft.source=responses"), "sft.source is 'data' there and 'responses' here")


def test_the_data_as_author_needs_no_second_file(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sections = {"prompts": {"source": answered(tmp_path)}, "responses": {"source": "data"}, "sft": SFT}
    finished = limbeck.run("train", tiny.recipe(run, **sections))
    assert finished.code == 0, finished.stderr
    assert not (run / "responses/sft.jsonl").exists() and (run / "metrics.sft.jsonl").exists()


def test_a_student_that_writes_needs_no_answers_of_the_teacher(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = tiny.recipe(
        run,
        prompts={"source": answered(tmp_path)},
        responses={"source": "student"},
        student={"layers": None, "keep": [0, 2]},
        sft=SFT | {"objective": {"name": "fkl"}},
        train={"max_steps": 2},
    )
    finished = limbeck.run("train", recipe)
    assert finished.code == 0, finished.stderr
    assert {r["split"] for r in lines(run / "responses/teacher.jsonl")} == {"heldout"}
    assert lines(run / "metrics.sft.jsonl")[0]["forward_kl"] > 0, "the teacher judges answers it has not written"


@pytest.mark.parametrize("without", [24, 5])
def test_data_without_answers_is_refused_before_the_teacher_works(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, without: int
) -> None:
    run = tmp_path / "run"
    recipe = tiny.recipe(run, prompts={"source": answered(tmp_path, without=without)}, sft=SFT)
    finished = limbeck.run("run", recipe)
    refused(finished, "has no answer", "training prompts", "sft.source=data", "set sft.source=responses")
    assert not (run / "responses").exists()
    # Also where the prompts were read for a recipe that did not need them.
    assert limbeck.run("prompts", recipe, "sft.source=responses").code == 0
    refused(limbeck.run("run", recipe, "--update"), "has no answer", "set sft.source=responses")


@pytest.mark.parametrize("name", ["responses/sft.jsonl", "checkpoints/sft/step-000002", "checkpoints/step-000002"])
def test_killed_it_goes_on_as_if_it_had_not_been(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, whole: Path, name: str
) -> None:
    run = tmp_path / "run"
    sections = {"prompts": {"source": answered(tmp_path)}, "responses": {"source": "pairs"}, "sft": SFT}
    recipe = tiny.recipe(run, **sections, train={"max_steps": 5})
    killed = limbeck.run("train", recipe, killed=KillAt(run, name, 0))
    assert killed.code == -signal.SIGKILL, killed
    finished = limbeck.run("train", recipe)
    assert finished.code == 0, finished.stderr
    assert measured(run) == measured(whole)
    for file in ("student/model.safetensors", "responses/sft.jsonl", "responses/teacher.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.fixture(scope="module")
def whole(limbeck: CommandServer, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    sections = {"prompts": {"source": answered(folder)}, "responses": {"source": "pairs"}, "sft": SFT}
    finished = limbeck.run("train", tiny.recipe(folder / "run", **sections, train={"max_steps": 5}))
    assert finished.code == 0, finished.stderr
    return folder / "run"
