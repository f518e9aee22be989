"""Runs whose teacher is behind a server: by hidden states, or by all tokens of its answers, the numbers of a local."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.files import read_json
from tests.teachers.scoring_server import ScoringHandler, scoring_server
from tests.teachers.stripped_model import StrippedModel
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

Served = tuple[StrippedModel, TinyPair, str, type[ScoringHandler]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("pair")
    model = StrippedModel(folder)
    rows = [{"prompt": text, "completion": f"An answer to {text}"} for text in questions()]
    tiny = TinyPair(teacher=model.whole, prompts=write_prompts(folder / "prompts.jsonl", rows))
    write_model(folder / "student", layers=2, seed=1, head_rows=320)
    (folder / "states").mkdir()
    with scoring_server(Tokenizer.from_file(str(model.folder / "tokenizer.json")), model.scores) as (handler, url, _):
        handler.states, handler.folder = staticmethod(model.states), folder / "states"
        yield model, tiny, url, handler


@pytest.mark.parametrize(
    ("source", "cache", "objective", "in_answers"),
    [
        ("data", True, "csd", False),
        ("student", True, "rkl", False),
        ("student", False, "js", False),
        ("student", True, "csd", True),
    ],
)
def test_losses_and_fidelity_are_those_of_a_teacher_in_this_process(
    served: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    cache: bool,
    objective: str,
    in_answers: bool,
) -> None:
    """At a temperature other than 1, on the data's answers and in rounds of the student's."""
    model, tiny, url, handler = served
    if in_answers:
        monkeypatch.setattr(handler, "pooled", staticmethod(model.hidden))
    losses, scores = [], []
    for where in ("in_process", {"name": "server", "base_url": url, "retries": 0, "timeout_s": 20.0}):
        here = where == "in_process"
        teacher = {"model": str(model.whole if here else model.folder), "where": where, "cache": cache}
        student = {"init": "pretrained", "layers": None, "model": str(model.folder.parent / "student")}
        answers: dict[str, Any] = (
            {"source": source, "initial_author": "data"} if source == "student" else {"source": source}
        )
        tree = tiny.tree(
            tmp_path / ("local" if here else "served"),
            responses=answers,
            student=student,
            teacher=teacher,
            objective={"name": objective, "temperature": 2.0},
            evaluate={"groups": {"fidelity": {"whose": ["responses", "student"]}}},
        )
        tree["train"]["max_steps"] = 3
        handler.state.requests = []
        run = run_pipeline(load_recipe(tree), stages=STAGES)
        rows = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
        scores.append(read_json(run.root / "scores.json")["after"])
        if not here:
            key = "input" if in_answers else "prompt"
            asked = [tuple(body[key]) for body in handler.state.requests if isinstance(body.get(key), list)]
            assert len(asked) == len(set(asked)) and len(asked) > 10
            assert not list(handler.folder.iterdir())
            assert not run.asked.exists()
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name in ("forward_kl", "forward_kl@student"):
        assert scores[1][name]["mean"] == pytest.approx(scores[0][name]["mean"], rel=1e-4), sorted(scores[0])


@pytest.mark.parametrize("source", ["student", "pairs"])
def test_rounds_on_likeliest_tokens_have_the_losses_of_the_whole_where_these_are_all(
    served: Served, tmp_path: Path, source: str
) -> None:
    """With two objectives too, one for each author; what was said of a round is kept until the next begins."""
    model, tiny, url, handler = served
    losses, scores = [], []
    handler.state.requests = []
    for where in ("in_process", {"name": "server", "base_url": url, "retries": 0, "timeout_s": 20.0}):
        here = where == "in_process"
        teacher = {"model": str(model.whole if here else model.folder), "where": where}
        student = {"init": "pretrained", "layers": None, "model": str(model.folder.parent / "student")}
        if not here:
            teacher |= {"support": "topk_tail", "support_k": model.local.head.vocab_size}
        more: dict[str, Any] = {}
        answers: dict[str, Any] = {"source": source, "initial_author": "data"}
        if source == "pairs":
            answers["source"] = {"name": "pairs", "resample_teacher": False}
            more["contrast"] = {"student": {"name": "srkl", "alpha": 0.1}}
        tree = tiny.tree(
            tmp_path / ("local" if here else "served"),
            responses=answers,
            student=student,
            teacher=teacher,
            objective={"name": "skl", "temperature": 1.0},
            evaluate={"groups": {"fidelity": {"whose": ["responses", "student"]}}},
            **more,
        )
        tree["train"]["max_steps"] = 3
        run = run_pipeline(load_recipe(tree), stages=STAGES)
        rows = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
        scores.append(read_json(run.root / "scores.json")["after"])
        if not here:
            asked = [tuple(body["prompt"]) for body in handler.state.requests if isinstance(body.get("prompt"), list)]
            # What was said of a round is kept, and what is asked of held-out answers afterwards is new.
            assert len(asked) == len(set(asked)) > 12 and not run.asked.exists()
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name in ("forward_kl", "reverse_kl", "forward_kl@student"):
        bound = scores[1][name.replace("kl", "kl_at_least")]["mean"]
        # Of all tokens a bound is the value itself.
        assert bound == pytest.approx(scores[0][name]["mean"], rel=1e-4), sorted(scores[1])
