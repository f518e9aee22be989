"""The group `likelihood`: the teacher's own log-probabilities of the student's answers beside somebody else's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from limbeck.evaluation.context import greedy
from limbeck.evaluation.groups.likelihood import LikelihoodGroup
from limbeck.evaluation.likelihood import mean_logp
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.prompts.io import write_prompts
from limbeck.prompts.sources import load_prompts
from limbeck.recipe.load import load_recipe
from limbeck.types import LimbeckError, Response
from tests.tiny_pair import TinyPair, write_model


@pytest.fixture(scope="module")
def evaluation(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> RunEvaluation:
    """Two models of the same tokens outside of a run, on prompts of which all but two have a reference."""
    folder = tmp_path_factory.mktemp("likelihood")
    student = write_model(folder / "student", layers=2, seed=1)
    tree = {
        "output_dir": str(folder / "run"),
        "teacher": {"model": str(tiny.teacher)},
        "student": {"model": str(student), "init": "pretrained"},
        "prompts": {"source": str(tiny.prompts)},
        "evaluate": {"max_new_tokens": 6, "prompts": 8},
    }
    context = RunContext(load_recipe(tree))
    loaded = load_prompts(str(tiny.prompts), heldout_fraction=0.5).prompts
    prompts = [replace(p, split="heldout", completion="It is." if i > 1 else None) for i, p in enumerate(loaded)]
    write_prompts(context.run.prompts, prompts)
    return RunEvaluation(context=context, part="after")


def naive(model: Any, response: Response) -> float:
    """The naive line: one answer, all logits, the mean over its tokens."""
    ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
    with torch.no_grad():
        logp_TV = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return float(logp_TV.gather(1, ids[0, 1:, None])[-len(response.response_ids) :].mean())


@pytest.mark.parametrize("against", ("teacher", "references"))
def test_win_rates_are_those_of_the_naive_line(evaluation: RunEvaluation, against: Any) -> None:
    group = LikelihoodGroup(against=against)
    found = group.measure(evaluation)  # type: ignore[arg-type]
    model, sampling = evaluation.teacher.model, greedy(evaluation.settings)
    prompts = evaluation.prompts[:8]
    own = {r.prompt_id: r for r in evaluation.answers("student", sampling, prompts)}
    if against == "teacher":
        others = {r.prompt_id: r for r in evaluation.answers("teacher", sampling, prompts)}
    else:
        others = {r.prompt_id: r for r in evaluation.encode_references("teacher", [p for p in prompts if p.completion])}
    rows = {row.id: row.values for row in found.tables[""]}
    assert rows.keys() == others.keys() and len(rows) == {"teacher": 8, "references": 6}[against]
    assert found.detail == {"against": against, "pairs": len(rows), "left_out": 8 - len(rows)}
    metric = {"teacher": "likelihood_win_rate", "references": "likelihood_win_rate_references"}[against]
    for name, values in rows.items():
        mine, other = naive(model, own[name]), naive(model, others[name])
        assert values["answer_logp"] == pytest.approx(mine, abs=1e-4)
        assert abs(mine - other) > 1e-4 and values[metric] == float(mine > other)
    assert all(metric in group.metrics for row in rows.values() for metric in row)


def test_the_order_and_the_batch_change_nothing(evaluation: RunEvaluation) -> None:
    responses = evaluation.answers("student", greedy(evaluation.settings), evaluation.prompts[:5])
    teacher, device = evaluation.scoring_teacher(stored=False), torch.device("cpu")
    whole, single = (dict(mean_logp(teacher, responses, batch_size=n, device=device)) for n in (5, 1))
    assert whole == pytest.approx(single, abs=1e-5) and sorted(whole) == list(range(5))


def test_the_same_answer_is_a_tie(evaluation: RunEvaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunEvaluation, "before", lambda self: self)
    rows = LikelihoodGroup(against="before").measure(evaluation).tables[""]  # type: ignore[arg-type]
    assert {row.values["likelihood_win_rate_before"] for row in rows} == {0.5}


def test_a_student_before_preference_tuning_must_be_there(evaluation: RunEvaluation) -> None:
    with pytest.raises(LimbeckError, match=r"likelihood\.against is distilled, .* has no section preference"):
        LikelihoodGroup(against="distilled").check(evaluation)  # type: ignore[arg-type]


def test_nobody_to_be_set_beside_is_said(evaluation: RunEvaluation) -> None:
    bare = replace(evaluation)
    bare.__dict__["prompts"] = [replace(p, completion=None) for p in evaluation.prompts]
    with pytest.raises(LimbeckError, match="none of 8 held-out prompts has an answer of both sides"):
        LikelihoodGroup(against="references").measure(bare)  # type: ignore[arg-type]
