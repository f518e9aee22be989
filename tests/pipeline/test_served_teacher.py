"""Runs whose teacher is behind a server: a student learns from it, and a pass that was cut off asks for the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.loading import load_model
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.signal_windows import SignalWindows
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.files import read_json
from limbeck.runtime.rundir import RunDirectory
from limbeck.teachers.store.shards import OpenShard
from limbeck.types import LimbeckError, Response
from tests.pipeline.test_text import corpus, losses
from tests.teachers.scoring_server import ScoringHandler, scoring_server
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

Served = tuple[TinyPair, str, type[ScoringHandler]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a model, and the folder of that model without its weights."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("pair")
    teacher = write_model(folder / "teacher")
    model = load_model(str(teacher)).model
    (teacher / "model.safetensors").unlink()
    rows = [{"prompt": text, "completion": f"An answer to {text}"} for text in questions()]
    tiny = TinyPair(teacher=teacher, prompts=write_prompts(folder / "prompts.jsonl", rows))
    write_model(folder / "student", layers=2, seed=1)

    def scores(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    with scoring_server(Tokenizer.from_file(str(teacher / "tokenizer.json")), scores) as (handler, url, _):
        yield tiny, url, handler


def tree_of(served: Served, output: Path, **sections: Any) -> dict[str, Any]:
    tiny, url, _ = served
    student = {"init": "pretrained", "layers": None, "model": str(tiny.teacher.parent / "student")}
    where = {"name": "server", "base_url": url, "retries": 0, "timeout_s": 10.0}
    teacher = {"support": "topk_tail", "support_k": 16, "where": where} | sections.pop("teacher", {})
    groups = {"rouge": {"against": ["references"]}, "nll": {"whose": "references"}}
    base = {"responses": {"source": "data"}, "student": student, "evaluate": {"groups": groups}}
    train = {"max_steps": 2} | sections.pop("train", {})
    tree = tiny.tree(output, **base | {"teacher": teacher, "objective": {"temperature": 1.0}} | sections)
    tree["train"] |= train
    return tree


def test_a_student_learns_from_a_teacher_whose_weights_are_elsewhere(served: Served, tmp_path: Path) -> None:
    handler = served[2]
    handler.state.requests = []
    recipe = load_recipe(tree_of(served, tmp_path / "run"))
    run = run_pipeline(recipe, stages=STAGES)
    texts = [tuple(body["prompt"]) for body in handler.state.requests if isinstance(body.get("prompt"), list)]
    assert len(texts) == len(set(texts)) > 20
    shards = sorted(run.signal.glob("[0-9]*.safetensors"))
    assert sorted(OpenShard(shards[0]).names) == ["ids", "logp"] and not run.asked.exists()
    assert sorted(read_json(run.root / "scores.json")["after"]) == ["nll", "rouge_l_references"]
    before = len(handler.state.requests)
    run_pipeline(recipe, stages=STAGES)
    assert len(handler.state.requests) == before, "a finished run needs no server"


# A step's signal takes some 4 KiB, and two windows are on disk.
WINDOWED = {"cache_limit_gib": 20 * 2**10 / 2**30}


def test_the_next_steps_are_scored_while_these_are_trained(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as with the whole signal, never more on disk than was said, and no waiting but for the first."""
    train = {"train": {"max_steps": 12, "logging_steps": 1}}
    whole = run_pipeline(load_recipe(tree_of(served, tmp_path / "whole", **train)), stages=STAGES)
    run = RunDirectory(tmp_path / "windows")
    scored: list[tuple[str, bool]] = []
    sizes: list[int] = []
    score = SignalWindows._score

    def lines() -> int:
        return len(run.metrics.read_text("utf-8").splitlines()) if run.metrics.exists() else 0

    def watched(self: SignalWindows, path: Path, responses: Sequence[Response]) -> None:
        here = threading.current_thread() is threading.main_thread()
        before, until = lines(), time.monotonic() + 30
        while not here and lines() == before and time.monotonic() < until:
            time.sleep(0.01)
        scored.append((path.parent.name, here))
        score(self, path, responses)
        sizes.append(sum(file.stat().st_size for file in run.signal_windows.rglob("*.safetensors")))
        assert here or lines() > before, "a step ended while the server was asked"

    monkeypatch.setattr(SignalWindows, "_score", watched)
    run_pipeline(load_recipe(tree_of(served, run.root, teacher=WINDOWED, **train)), stages=STAGES)
    assert len(scored) > 2 and scored == [(f"{i:04d}", i == 0) for i in range(len(scored))]
    assert max(sizes) <= WINDOWED["cache_limit_gib"] * 2**30
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert len(losses(run)) == 12 and not run.signal_windows.exists() and not run.asked.exists()


def test_a_server_that_fails_while_it_scores_ahead_is_asked_for_the_rest(served: Served, tmp_path: Path) -> None:
    handler = served[2]
    tree = tree_of(served, tmp_path / "run", teacher=WINDOWED, train={"max_steps": 12, "logging_steps": 1})
    recipe = load_recipe(tree, ["teacher.where.concurrency=1"])
    straight = run_pipeline(load_recipe(tree, [f"output_dir={tmp_path / 'straight'}"]), stages=STAGES)
    handler.state.requests = []
    # Models, four texts for the tokenizer and the probe; six held-out responses; the windows of the first four steps.
    handler.state.faults = [None] * (6 + 6 + 16 + 2) + ["hang up"]
    with pytest.raises(LimbeckError, match="cut the connection off"):
        run_pipeline(recipe, stages=STAGES)
    handler.state.faults = []
    run = RunDirectory(tmp_path / "run")
    assert losses(run) == losses(straight)[:4]
    run_pipeline(recipe, stages=STAGES)
    assert losses(run) == losses(straight)


def test_plain_text_is_scored_by_a_server(served: Served, tmp_path: Path) -> None:
    """With nearly the losses of the same teacher in this process."""
    sections: dict[str, Any] = {
        "prompts": {"source": corpus(tmp_path, [f"Salt and moss {i}. " * 4 for i in range(30)])},
        "responses": {"source": "text", "max_new_tokens": 20},
        "evaluate": {"groups": {"perplexity": {"teacher": False}}},
        "train": {"max_steps": 4, "logging_steps": 1},
    }
    asked = run_pipeline(load_recipe(tree_of(served, tmp_path / "asked", **sections)), stages=STAGES)
    tree = tree_of(served, tmp_path / "here", **sections)
    tree["teacher"] |= {"where": "in_process", "model": str(write_model(tmp_path / "teacher"))}
    here = run_pipeline(load_recipe(tree), stages=STAGES)
    # The server's tokens have the one that followed among them.
    assert losses(asked) == pytest.approx(losses(here), rel=0.03) and len(losses(asked)) == 4
    assert not asked.asked.exists()


def test_a_pass_that_was_cut_off_asks_for_the_rest(served: Served, tmp_path: Path) -> None:
    handler = served[2]
    handler.state.requests = []
    recipe = load_recipe(tree_of(served, tmp_path / "run"), ["teacher.where.concurrency=1"])
    # Models, four texts for the tokenizer, the probe, and five responses.
    handler.state.faults = [None] * 10 + ["hang up"]
    with pytest.raises(LimbeckError, match="cut the connection off"):
        run_pipeline(recipe, stages=STAGES)
    handler.state.faults = []
    assert list((tmp_path / "run" / "asked").glob("*.safetensors"))
    run_pipeline(recipe, stages=STAGES)
    asked = [tuple(body["prompt"]) for body in handler.state.requests if isinstance(body.get("prompt"), list)]
    # The probe and the one request that was cut off come twice.
    assert len(asked) - len(set(asked)) == 2


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"teacher": {"support": "full"}}, ("teacher.support=full", "likeliest tokens", "teacher.support=topk_tail")),
        ({"objective": {"temperature": 2.0}}, ("fkl is impossible", "temperature 1 alone", "objective.temperature=1")),
        ({"objective": {"name": "dld", "temperature": 1.0}}, ("dld is impossible", "whole distribution")),
        ({"responses": {"source": "teacher"}}, ("responses.source=teacher", "answers", "source=data")),
        ({"evaluate": {"groups": {"fidelity": {"whose": ["teacher"]}}}}, ("evaluate.groups.fidelity", "leave it out")),
    ],
)
def test_what_a_server_cannot_give_is_refused_before_anything_is_asked(
    served: Served, tmp_path: Path, sections: dict[str, Any], parts: tuple[str, ...]
) -> None:
    served[2].state.requests = []
    with pytest.raises(LimbeckError) as error:
        run_pipeline(load_recipe(tree_of(served, tmp_path / "run", **sections)), stages=STAGES)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not served[2].state.requests


def test_the_worth_of_each_objective_is_said(served: Served, tmp_path: Path) -> None:
    from limbeck.pipeline.signal_statement import verdicts_of

    parts = [{"name": "srkl", "alpha": 0.1}, {"name": "ce"}, {"name": "ab"}]
    recipe = load_recipe(
        tree_of(served, tmp_path / "run", objective={"name": "sum", "parts": parts, "temperature": 1.0})
    )
    worths = {one.objective: one.worth for one in verdicts_of(recipe, vocab_size=300)}
    assert worths == {"srkl": "bounded", "ce": "exact", "ab": "approximate"}
    assert {one.worth for one in verdicts_of(recipe, vocab_size=16)} == {"exact"}
