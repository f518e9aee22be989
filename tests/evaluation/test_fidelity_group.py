"""Whose answers fidelity is measured on, on whole runs of a tiny pair, against both models' own logits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from limbeck.evaluation.scores.metrics import METRICS
from limbeck.prompts.io import read_prompts
from limbeck.prompts.templates import encode_responses
from limbeck.rollouts.io import read_responses
from limbeck.types import LimbeckError, Response
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

CONDITIONS = ("", "@teacher", "@student", "@references")
LENGTH = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("fidelity")
    rows = [{"prompt": text, "completion": f"It is {i}, and more."} for i, text in enumerate(questions())]
    return TinyPair(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl", rows))


@pytest.fixture(scope="module")
def root(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that measured on everybody's answers."""
    tree = pair.tree(tmp_path_factory.mktemp("run") / "run", train={"max_steps": 2}, teacher={"cache_dtype": "float32"})
    tree["evaluate"] = {
        "groups": {"fidelity": {"whose": ["student", "responses", "teacher", "references"], "top_k": 3}},
        "max_new_tokens": LENGTH,
    }
    return limbeck.run(tree).directory


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def naive(student: Any, teacher: Any, responses: Iterable[Response]) -> dict[str, float]:
    """Means over all tokens of the answers, a row at a time, from the models' own logits in float64."""
    totals, tokens = dict.fromkeys(("forward_kl", "student_nll", "topk_agreement"), 0.0), 0
    for response in responses:
        ids_1T = torch.tensor([[*response.prompt_ids, *response.response_ids]])
        start, labels_N = len(response.prompt_ids) - 1, torch.tensor(response.response_ids)
        with torch.no_grad():
            q, p = (m(input_ids=ids_1T).logits[0, start:-1].double().log_softmax(-1) for m in (student, teacher))
        totals["forward_kl"] += float((p.exp() * (p - q)).sum())
        totals["student_nll"] -= float(q.gather(1, labels_N[:, None]).sum())
        top_q, top_p = q.topk(3).indices, p.topk(3).indices
        totals["topk_agreement"] += float((top_p[:, :, None] == top_q[:, None]).any(2).double().mean(1).sum())
        tokens += len(labels_N)
    return {name: total / tokens for name, total in totals.items()}


def expected_answers(pair: TinyPair, root: Path) -> Mapping[str, list[Response]]:
    held = [prompt for prompt in read_prompts(root / "prompts.jsonl") if prompt.split == "heldout"]
    found = {
        who: [r for path in (root / "scores/answers").glob(f"{writer}-*.jsonl") for r in read_responses(path)]
        for who, writer in (("@teacher", "teacher"), ("@student", "after"))
    }
    stored = read_responses(root / "responses/teacher.jsonl")
    references = encode_responses(held, AutoTokenizer.from_pretrained(pair.teacher), max_new_tokens=LENGTH)
    return found | {"": [r for r in stored if r.split == "heldout"], "@references": references}


def test_each_condition_is_measured_on_its_own_answers(pair: TinyPair, root: Path) -> None:
    scores = read(root / "scores.json")
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (root / "student", pair.teacher))
    answers = expected_answers(pair, root)
    for condition in CONDITIONS:
        assert len(answers[condition]) == scores["after"][f"forward_kl{condition}"]["n"] == 6
        for name, value in naive(student, teacher, answers[condition]).items():
            assert scores["after"][f"{name}{condition}"]["mean"] == pytest.approx(value, rel=1e-4), name + condition
    assert {r.author for r in answers["@student"]} == {"student"}


def test_every_metric_is_there_before_and_after(root: Path) -> None:
    scores = read(root / "scores.json")
    names = {name for name in scores["after"] if "@" not in name}
    assert names <= set(METRICS) and {"student_ece", "teacher_ece", "ece_to_teacher", "jensen_shannon"} <= names
    every = {name + condition for name in names for condition in CONDITIONS}
    assert every == set(scores["before"]) == set(scores["after"]) == set(scores["change"])
    for side in ("before", "after"):
        for name, score in scores[side].items():
            assert score["low"] <= score["mean"] <= score["high"], name


def test_the_detail_holds_curves_positions_and_whose(root: Path) -> None:
    detail = read(root / "scores/after.fidelity.json")["detail"]
    assert list(detail) == ["student", "responses", "teacher", "references"]
    scores = read(root / "scores.json")["after"]
    for whose, found in detail.items():
        condition = "" if whose == "responses" else f"@{whose}"
        assert found["answers"] == whose and found["top_k"] == 3
        assert found["by_position"][0]["tokens"] == found["examples"] == 6
        assert sum(line["tokens"] for line in found["by_position"]) == found["tokens"]
        mean = sum(line["tokens"] * line["reverse_kl"] for line in found["by_position"]) / found["tokens"]
        assert mean == pytest.approx(scores[f"reverse_kl{condition}"]["mean"])
        for name, points in found["reliability"].items():
            gap = sum(point["tokens"] * abs(point["outcome"] - point["confidence"]) for point in points)
            assert gap / found["tokens"] == pytest.approx(scores[name + condition]["mean"], abs=1e-9)


@pytest.mark.parametrize("answered", [True, False])
def test_on_its_own_the_detail_says_whose_answers(pair: TinyPair, tmp_path: Path, answered: bool) -> None:
    rows = [{"prompt": text} | ({"completion": "It is so."} if answered else {}) for text in questions(5)]
    source = "references" if answered else "teacher"
    student = write_model(tmp_path / "student", layers=2, seed=5)
    out = tmp_path / "out"
    options = (f"output_dir={out}", "evaluate.groups=[fidelity]", f"evaluate.max_new_tokens={LENGTH}")
    whose = f"evaluate.groups.fidelity.whose=[responses,{source}]"
    data = write_prompts(tmp_path / "data.jsonl", rows)
    limbeck.evaluate(student, *options, whose, prompts=data, teacher=pair.teacher)
    detail = read(out / "scores/after.fidelity.json")["detail"]
    assert {found["answers"] for found in detail.values()} == {source}
    rows_of = [(out / f"scores/after.fidelity{name}.jsonl").read_text("utf-8") for name in ("", f"@{source}")]
    assert rows_of[0] == rows_of[1]


def test_references_must_be_there(pair: TinyPair, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "data.jsonl")
    options = (f"output_dir={tmp_path / 'out'}", "evaluate.groups=[fidelity]")
    with pytest.raises(LimbeckError, match="reference"):
        limbeck.evaluate(
            pair.teacher, *options, "evaluate.groups.fidelity.whose=[references]", prompts=data, teacher=pair.teacher
        )
    with pytest.raises(LimbeckError, match=r"evaluate\.groups\.fidelity\.whose is \[\]"):
        limbeck.evaluate(
            pair.teacher, *options, "evaluate.groups.fidelity.whose=[]", prompts=data, teacher=pair.teacher
        )


def test_references_are_a_need_where_they_are_asked_for(pair: TinyPair, tmp_path: Path) -> None:
    evaluate = limbeck.load(pair.tree(tmp_path / "run")).evaluate
    assert evaluate.groups["fidelity"].needs() == {"teacher", "tokens"}
    asked = limbeck.load(pair.tree(tmp_path / "run"), "evaluate.groups.fidelity.whose=[teacher,references]").evaluate
    assert asked.groups["fidelity"].needs() == {"teacher", "teacher_answers", "tokens", "prompts", "references"}
