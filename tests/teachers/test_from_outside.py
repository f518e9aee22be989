"""A teacher that another package brings: registered, and a whole run is played with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.vocabulary import describe_vocabulary
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.files import read_json
from limbeck.teachers.base import Provision, Teacher
from limbeck.teachers.registry import TEACHERS
from limbeck.types import DenseSignal, Head, LimbeckError, TokenBatch
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts


@dataclass(kw_only=True)
class UniformTeacher(Teacher):
    """Finds all tokens equally likely."""

    width: int

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"hidden"})

    @property
    def head(self) -> Head:
        rows = self.vocabulary.vocab_size
        return Head(weight_VD=torch.zeros(rows, self.width), vocab_size=rows)

    def signal(self, batch: TokenBatch) -> DenseSignal:
        return DenseSignal(hidden_ND=torch.ones(len(batch.labels_N), self.width), head=self.head)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """All tokens are equally likely."""

    width: int = 4

    def open(self, model: Any, *, device: Any, progress: Any) -> UniformTeacher:
        return UniformTeacher(model=model, device=device, progress=progress, width=self.width)


@pytest.fixture
def registered() -> Iterator[None]:
    TEACHERS.register("uniform", Uniform)
    yield
    TEACHERS.unregister("uniform")


def test_a_run_with_a_teacher_from_outside(registered: None, tmp_path: Path) -> None:
    teacher, student = write_model(tmp_path / "teacher"), write_model(tmp_path / "small", layers=2, seed=1)
    rows = [{"prompt": text, "completion": f"An answer to {text}"} for text in questions()]
    tiny = TinyPair(teacher=teacher, prompts=write_prompts(tmp_path / "prompts.jsonl", rows))
    tree = tiny.tree(tmp_path / "run", responses={"source": "data"})
    tree["teacher"]["where"] = {"name": "uniform", "width": 6}
    tree["student"] = {"init": "pretrained", "model": str(student)}
    tree["train"]["max_steps"] = 2
    tree["evaluate"]["groups"] = ["fidelity"]
    run = run_pipeline(load_recipe(tree), stages=STAGES)
    entropy = read_json(run.root / "scores.json")["after"]["teacher_entropy"]["mean"]
    assert entropy == pytest.approx(math.log(describe_vocabulary(teacher).vocab_size), rel=1e-5)


def test_an_unknown_place_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny = TinyPair.write(tmp_path)
    tree = tiny.tree(tmp_path / "run")
    tree["teacher"]["where"] = "in_proces"
    with pytest.raises(LimbeckError, match=r"teacher 'in_proces' is unknown \(nearest: 'in_process'\)") as error:
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert "\n" not in str(error.value)
