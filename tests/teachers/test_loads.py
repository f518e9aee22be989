"""How often the weights of a teacher are read in a whole run, and what is known of it without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models import loading
from limbeck.models.heads import head_of
from limbeck.models.vocabulary import real_vocab_size
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.student import build
from limbeck.student.endings import stop_ids
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.in_process import InProcess, InProcessTeacher
from tests.models.tiny import FAMILIES, save_tiny
from tests.tiny_pair import TinyPair, write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair.write(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models whose weights are read."""
    read: list[str] = []
    original = loading.load_model

    def counted(name: str | Path, **options: Any) -> loading.LoadedModel:
        read.append(str(name))
        return original(name, **options)

    monkeypatch.setattr(loading, "load_model", counted)
    monkeypatch.setattr(build, "load_model", counted)
    return read


SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "quickstart": {},
    "on-policy": {"responses": {"source": "student"}},
    "student of its own": {"student": {"init": "pretrained", "layers": None}},
    "labels of the teacher": {"objective": {"name": "ce"}, "teacher": {"cache": False}},
    "no cache": {"teacher": {"cache": False}},
}


# Once to write or to be learned from, once to write the answers that the student's are compared to. What is not stored
# is asked again for the student before training and after it, each of which has written its answers alone in memory.
TWICE, AGAIN_BY_PART = 2, 4
MOST_LOADS = dict.fromkeys(SHAPES, TWICE) | {"labels of the teacher": AGAIN_BY_PART, "no cache": AGAIN_BY_PART}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_reads_the_weights_of_its_teacher_only_as_often_as_it_must(
    shape: str, tiny: TinyPair, tmp_path: Path, loads: list[str]
) -> None:
    sections = SHAPES[shape]
    if "student" in sections:
        student = write_model(tmp_path / "small", layers=2, seed=1)
        sections = {"student": {**sections["student"], "model": str(student)}}
    tree = tiny.tree(tmp_path / "run", **sections)
    tree["train"]["max_steps"] = 2
    tree["evaluate"]["groups"] = ["fidelity", "rouge"]
    run_pipeline(load_recipe(tree), stages=STAGES)
    assert 1 <= loads.count(str(tiny.teacher)) <= MOST_LOADS[shape]


def test_a_teacher_is_not_in_memory_while_a_student_learns_from_what_is_on_disk(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck.pipeline.stages import train as stage

    held: list[bool] = []
    teachers: list[InProcessTeacher] = []
    opened, trained = InProcess.open, stage.train

    def watched(self: InProcess, *args: Any, **options: Any) -> InProcessTeacher:
        teachers.append(opened(self, *args, **options))
        return teachers[-1]

    def training(*args: Any, **options: Any) -> Any:
        held.append(any(teacher.loaded for teacher in teachers))
        return trained(*args, **options)

    monkeypatch.setattr(InProcess, "open", watched)
    monkeypatch.setattr(stage, "train", training)
    for name, signal in (("cached", True), ("asked", False)):
        tree = tiny.tree(tmp_path / name, teacher={"cache": signal})
        tree["train"]["max_steps"] = 1
        run_pipeline(load_recipe(tree), stages=STAGES, until="train")
    assert held == [False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_known_without_weights_is_what_the_weights_say(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / family, family)
    teacher = opened(folder)
    loaded = loading.load_model(folder, attn_implementation="eager")
    expected = head_of(loaded.model, real_vocab_size(loaded.tokenizer))
    monkeypatch.setattr(loading, "load_model", None)
    assert teacher.size == loaded.provenance.parameters
    assert stop_ids(teacher.skeleton) == stop_ids(loaded.model)
    assert teacher.fingerprint == loaded.provenance.fingerprint
    assert torch.equal(teacher.head.weight_VD, expected.weight_VD)
    assert (teacher.head.scale, teacher.head.softcap) == (expected.scale, expected.softcap)


def opened(folder: Path) -> InProcessTeacher:
    return InProcess().open(TeacherModel(model=str(folder), attn_implementation="eager"), device=CPU, progress=None)
