"""Runs with several teachers: who writes and scores what, one at a time, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models import loading
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import open_teacher
from limbeck.prompts.io import read_prompts
from limbeck.recipe.load import as_tree, load_recipe, to_yaml
from limbeck.rollouts.collate import collate
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.in_process import InProcessTeacher
from limbeck.types import DenseSignal, LimbeckError
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("pair")
    rows = [
        {"prompt": text, "completion": f"It is {i}.", "teacher_id": "uses" if "uses" in text else "what"}
        for i, text in enumerate(questions())
    ]
    write_model(folder / "other", layers=2, width=48, seed=3)
    write_model(folder / "student", layers=2, seed=5)
    return TinyPair(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl", rows))


def tree_of(tiny: TinyPair, output: Path, **sections: Any) -> dict[str, Any]:
    folder = tiny.teacher.parent
    teachers = {"what": {"model": str(tiny.teacher)}, "uses": {"model": str(folder / "other")}}
    student = {"init": "pretrained", "layers": None, "model": str(folder / "student")}
    own = {"teachers": sections.pop("teachers", teachers), "combine": sections.pop("combine", "column")}
    tree = tiny.tree(output, **{"student": student, "evaluate": {"groups": ["fidelity", "rouge"]}} | sections)
    del tree["teacher"]
    tree |= own
    tree["train"] |= {"max_steps": 3, **sections.get("train", {})}
    return tree


def logp(signal: Any) -> torch.Tensor:
    from limbeck.models.heads import project

    assert isinstance(signal, DenseSignal)
    return project(signal.head, signal.hidden_ND).double().log_softmax(-1)


def alone(model: Path) -> InProcessTeacher:
    return InProcessTeacher(model=TeacherModel(model=str(model)), device=CPU)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of teachers in memory, each time that the weights of one are asked for."""
    counts: list[int] = []
    original = InProcessTeacher._model
    held: list[InProcessTeacher] = []

    def counted(self: InProcessTeacher) -> loading.LoadedModel:
        found = original(self)
        held.append(self)
        counts.append(sum(one.loaded for one in {id(t): t for t in held}.values()))
        return found

    monkeypatch.setattr(InProcessTeacher, "_model", counted)
    return counts


def test_each_prompt_is_answered_and_scored_by_its_teacher_one_in_memory_at_a_time(
    tiny: TinyPair, tmp_path: Path, together: list[int]
) -> None:
    recipe = load_recipe(tree_of(tiny, tmp_path / "run", responses={"temperature": 0.0}))
    run_pipeline(recipe, stages=STAGES, until="train")
    assert together and max(together) == 1
    context = RunContext(recipe)
    prompts = {p.id: p for p in read_prompts(context.run.prompts)}
    responses = list(load_responses(context, "train").values())
    models = {"what": tiny.teacher, "uses": tiny.teacher.parent / "other"}
    stored = open_teacher(context)
    for name, model in models.items():
        own = [r for r in responses if prompts[r.prompt_id].columns["teacher_id"] == name][:4]
        batch = collate(own, range(len(own)), pad_id=0)
        teacher = alone(model)
        torch.testing.assert_close(logp(stored.signal(batch)), logp(teacher.signal(batch)), rtol=1e-4, atol=1e-4)
        written: Any = teacher.weights().model
        ids = torch.tensor([own[0].prompt_ids])
        most = len(own[0].response_ids)
        answer = written.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
        assert tuple(answer[0, ids.shape[1] :].tolist()) == own[0].response_ids


def test_a_mean_is_stored_with_one_teacher_in_memory_at_a_time(
    tiny: TinyPair, tmp_path: Path, together: list[int]
) -> None:
    sections: dict[str, Any] = {"prompts": {"ignore_columns": ["teacher_id"]}, "evaluate": {"groups": ["fidelity"]}}
    tree = tree_of(tiny, tmp_path / "run", combine="mean_log_p", responses={"source": "data"}, **sections)
    recipe = load_recipe(tree)
    run_pipeline(recipe, stages=STAGES, until="teach")
    assert together and max(together) == 1
    assert not (recipe.directory / "signal/parts").exists()
    context = RunContext(recipe)
    responses = list(load_responses(context, "train").values())[:3]
    batch = collate(responses, range(3), pad_id=0)
    stored, beside = open_teacher(context).signal(batch), context.teacher.signal(batch)
    torch.testing.assert_close(logp(stored), logp(beside), rtol=1e-4, atol=1e-4)


def test_scores_are_of_each_teacher_too(tiny: TinyPair, tmp_path: Path) -> None:
    run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run")), stages=STAGES)
    after = json.loads((tmp_path / "run/scores.json").read_text("utf-8"))["after"]
    whole, parts = after["forward_kl"], [after[f"forward_kl@teacher={name}"] for name in ("what", "uses")]
    assert sum(part["n"] for part in parts) == whole["n"]
    assert min(p["mean"] for p in parts) < whole["mean"] < max(p["mean"] for p in parts)


@pytest.mark.parametrize(
    "combine", [{"name": "mean_log_p"}, {"name": "rule", "patterns": {"uses": "uses"}, "otherwise": "what"}]
)
def test_on_policy_and_stored_signals_of_several(tiny: TinyPair, tmp_path: Path, combine: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"combine": combine, "prompts": {"ignore_columns": ["teacher_id"]}}
    sections["evaluate"] = {"groups": ["fidelity"]}
    losses = {}
    for name, responses, cache in (("data", "data", True), ("beside", "data", False), ("rounds", "student", True)):
        more = {"responses": {"source": responses, "initial_author": "data"}} if responses == "student" else {}
        tree = tree_of(tiny, tmp_path / name, **{"responses": {"source": responses}} | sections | more)
        for teacher in tree["teachers"].values():
            teacher["cache"] = cache
        run_pipeline(load_recipe(tree), stages=STAGES)
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    torch.testing.assert_close(torch.tensor(losses["data"]), torch.tensor(losses["beside"]), rtol=1e-4, atol=1e-5)
    assert all(loss > 0 for loss in losses["rounds"])


def test_one_of_several_is_the_teacher_alone(tiny: TinyPair, tmp_path: Path) -> None:
    plain = tiny.tree(tmp_path / "run", prompts={"ignore_columns": ["teacher_id"]})
    named = {key: value for key, value in plain.items() if key != "teacher"} | {"teachers": {"only": plain["teacher"]}}
    assert to_yaml(load_recipe(named)) == to_yaml(load_recipe(plain))


def test_a_recipe_of_several_is_read_back(tiny: TinyPair, tmp_path: Path) -> None:
    recipe = load_recipe(tree_of(tiny, tmp_path / "run"))
    assert load_recipe(as_tree(recipe)) == recipe
    changed = load_recipe(tree_of(tiny, tmp_path / "run"), ["teachers.uses.dtype=bfloat16", "combine.column=domain"])
    assert changed.teachers["uses"].dtype == "bfloat16" and changed.combine.column == "domain"  # type: ignore[union-attr]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"combine": None}, "say how they are combined with combine=column"),
    ({"combine": {"name": "column", "column": "domain"}}, "the column 'domain', which the recipe reads"),
    ({"combine": {"name": "rule", "patterns": {"what": "What"}}}, "no pattern of combine.patterns is found"),
    (
        {"combine": {"name": "rule", "patterns": {"uses": "zzz"}, "otherwise": "what"}},
        "gives teachers.uses no training",
    ),
    ({"combine": {"name": "rule", "patterns": {"art": "x"}}}, "combine names the teacher 'art'"),
    ({"combine": "mean_log_p"}, "a mean of several teachers has distributions alone"),
    ({"student": {"init": "depth_prune", "layers": 2}}, "of several teachers none is the one to begin as"),
    ({"responses": {"source": "pairs"}}, "responses.source.resample_teacher=false"),
    ({"evaluate": {"groups": ["cost"]}}, "leave cost out of evaluate.groups"),
    ({"prompts": {"ignore_columns": ["teacher_id"]}}, "which combine reads"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_what_cannot_be_had_of_several_is_refused_in_one_line(
    tiny: TinyPair, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    sections = json.loads(json.dumps(sections))
    tree = tree_of(tiny, tmp_path / "run", **sections)
    if "combine" in sections and "column" not in str(sections["combine"]):
        tree["prompts"]["ignore_columns"] = ["teacher_id"]
    with pytest.raises(LimbeckError) as caught:
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("responses/batches/*"))


def test_teachers_with_different_tokens_are_refused(tiny: TinyPair, tmp_path: Path) -> None:
    strange = write_model(tmp_path / "strange", extra=["entirely other words " * 40])
    tree = tree_of(
        tiny, tmp_path / "run", teachers={"what": {"model": str(tiny.teacher)}, "uses": {"model": str(strange)}}
    )
    with pytest.raises(LimbeckError, match=r"teachers\.what .* and teachers\.uses .* have different tokens"):
        run_pipeline(load_recipe(tree), stages=STAGES)


def test_a_row_that_names_no_teacher_is_named(tiny: TinyPair, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.prompts.read_text("utf-8").splitlines()]
    rows[6]["teacher_id"] = "poetry"
    path = write_prompts(tmp_path / "odd.jsonl", rows)
    with pytest.raises(LimbeckError, match=r"odd\.jsonl, line 7: the column 'teacher_id' names the teacher 'poetry'"):
        run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run", prompts={"source": str(path)})), stages=STAGES)


def test_settings_of_the_signal_are_shared(tiny: TinyPair, tmp_path: Path) -> None:
    tree = tree_of(tiny, tmp_path / "run")
    tree["teachers"]["uses"]["cache"] = False
    with pytest.raises(LimbeckError, match=r"teachers\.uses\.cache is False and teachers\.what\.cache True"):
        load_recipe(tree)
