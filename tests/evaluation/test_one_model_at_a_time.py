"""Which models an evaluation has in memory: while one writes, it is alone; of stored signals none is loaded."""

from __future__ import annotations

import importlib.util
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

import limbeck.pipeline.evaluation_context as evaluation_context
from limbeck.evaluation.context import ChatModel, Part
from limbeck.evaluation.groups.fidelity import FidelityGroup
from limbeck.models.loading import LoadedModel
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.pipeline.evaluation_models import EvaluatedModels
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.evaluate import examine
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import QuietConsole
from limbeck.teachers.in_process import InProcessTeacher
from tests.evaluation import few_problems
from tests.evaluation.judge_server import JUDGE, judging
from tests.tiny_pair import TinyPair, write_model


@dataclass
class Memory:
    """The models that were loaded, and those that were in memory while one of them wrote.

    Attributes:
        wrote: who wrote, and which models were alive, for each file of answers.
    """

    models: list[tuple[str, weakref.ref[Any]]] = field(default_factory=list)
    loads: Counter[str] = field(default_factory=Counter)
    wrote: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    def note(self, who: str, model: Any) -> None:
        self.loads[who] += 1
        self.models.append((who, weakref.ref(model)))

    @property
    def alive(self) -> tuple[str, ...]:
        return tuple(who for who, model in self.models if model() is not None)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    load_student, load_teacher = EvaluatedModels._load_student, InProcessTeacher._load
    write = evaluation_context.write_in_batches

    def student(self: EvaluatedModels) -> ChatModel:
        loaded = load_student(self)
        found.note(self.part, loaded.model)
        return loaded

    def teacher(self: InProcessTeacher) -> LoadedModel:
        loaded = load_teacher(self)
        found.note("teacher", loaded.model)
        return loaded

    def written(sampler: Any, asked: Any, sampling: Any, folder: Path, **options: Any) -> Any:
        found.wrote.append((folder.name.partition("-")[0], found.alive))
        return write(sampler, asked, sampling, folder, **options)

    monkeypatch.setattr(EvaluatedModels, "_load_student", student)
    monkeypatch.setattr(InProcessTeacher, "_load", teacher)
    monkeypatch.setattr(evaluation_context, "write_in_batches", written)
    return found


@pytest.fixture
def judge() -> Iterator[str]:
    with judging() as (address, _):
        yield address


def run_of(tiny: TinyPair, folder: Path, groups: dict[str, Any], **sections: Any) -> RunContext:
    """A run up to its evaluation."""
    tree = tiny.tree(folder / "run", **sections)
    tree["evaluate"] = {"groups": groups, "max_new_tokens": 6}
    recipe = load_recipe(tree)
    run_pipeline(recipe, stages=STAGES, until="train", console=QuietConsole())
    return RunContext(recipe, QuietConsole())


def test_while_one_model_writes_it_is_alone(tiny: TinyPair, tmp_path: Path, memory: Memory, judge: str) -> None:
    """In a run whose student is cut out of the teacher, each is loaded once for all of its answers."""
    files = {"gsm8k": str(few_problems.write(tmp_path, "gsm8k"))}
    groups = {
        "fidelity": {},
        "rouge": {"against": ["teacher"]},
        "diversity": {"samples": 2, "temperatures": [0.0, 1.0]},
        "tasks": {"files": files, "teacher": True, "max_new_tokens": 4},
        "judge": {"base_url": judge, "model": JUDGE},
        "speculation": {"draft_tokens": [2], "prompts": 2},
    }
    context = run_of(tiny, tmp_path, groups)
    memory.loads.clear()
    examine(context, ("before", "after"))
    assert {who for who, _ in memory.wrote} == {"before", "after", "teacher"}
    assert all(alive == (who,) for who, alive in memory.wrote), memory.wrote
    # The teacher wrote all there is to write before the student was cut out of it; speculation takes both.
    assert memory.loads == {"teacher": 2, "before": 1, "after": 1}
    assert memory.alive == ("teacher",)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev")
def test_stand_ins_are_in_memory_one_after_the_other(tiny: TinyPair, tmp_path: Path, memory: Memory) -> None:
    groups = {
        "rouge": {"against": ["teacher"]},
        "nll": {},
        "cost": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1},
        "recovery": {"baselines": ["llama_cpp", "imatrix"]},
    }
    student = {"init": "teacher", "layers": None, "quantize": {"format": "q4_0"}}
    context = run_of(tiny, tmp_path, groups, student=student)
    memory.loads.clear()
    found = examine(context, ("after",))["after"]
    assert all(alive == (who,) for who, alive in memory.wrote), memory.wrote
    assert {who for who, _ in memory.wrote} == {"teacher", "after", "llama_cpp", "imatrix"}
    assert (memory.loads["llama_cpp"], memory.loads["imatrix"]) == (1, 1) and not memory.alive
    # What is measured after training alone is not measured of them.
    assert "rouge@imatrix" in found and not any(name.startswith("cost") and "llama_cpp" in name for name in found)


def test_a_teacher_that_scores_alone_has_no_student_beside_it(
    tiny: TinyPair, tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = run_of(tiny, tmp_path, {"fidelity": {}, "likelihood": {}, "nll": {}})
    scored: list[tuple[str, ...]] = []
    signal = InProcessTeacher.signal

    def watched(self: InProcessTeacher, batch: Any) -> Any:
        found = signal(self, batch)
        scored.append(memory.alive)
        return found

    monkeypatch.setattr(InProcessTeacher, "signal", watched)
    examine(context, ("before", "after"))
    assert scored and set(scored) == {("teacher",)}
    assert all(alive == (who,) for who, alive in memory.wrote), memory.wrote


def test_stored_signals_are_read_without_the_teacher(tiny: TinyPair, tmp_path: Path, memory: Memory) -> None:
    context = run_of(tiny, tmp_path, {"fidelity": {}, "nll": {}})
    memory.loads.clear()
    examine(context, ("after",))
    assert memory.loads == {"after": 1}


def test_both_are_there_where_fresh_answers_are_compared_and_nothing_is_written(
    tiny: TinyPair, tmp_path: Path, memory: Memory
) -> None:
    context = run_of(tiny, tmp_path, {"fidelity": {"whose": ["student", "teacher"]}})
    memory.loads.clear()
    examine(context, ("after",))
    assert sorted(memory.wrote) == [("after", ("after",)), ("teacher", ("teacher",))]
    assert memory.loads == {"teacher": 2, "after": 1}
    assert FidelityGroup(whose=("student",)).takes_both and not FidelityGroup().takes_both


@pytest.mark.parametrize("part", ("before", "after"))
def test_the_small_files_say_what_the_models_do(tiny: TinyPair, tmp_path: Path, memory: Memory, part: Part) -> None:
    """Window, template and tokenizer of a student with a narrower window of its own, before it is loaded and after."""
    own = write_model(tmp_path / "own", layers=2, seed=1, window=96)
    student = {"init": "pretrained", "model": str(own), "layers": None}
    context = run_of(tiny, tmp_path, {"rouge": {}}, student=student)
    memory.loads.clear()
    evaluation = RunEvaluation(context=context, part=part)
    window, template = evaluation.window_of("student"), evaluation.template("student")
    tokenizer = evaluation.tokenizer("student")
    assert window == 96 and not memory.loads
    loaded, model = evaluation.student, cast("Any", evaluation.student.model)
    assert model.config.max_position_embeddings == window and loaded.template == template
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
