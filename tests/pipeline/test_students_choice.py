"""Runs on a top-k signal with the student's own likeliest tokens: before training, in rounds, local and served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.loading import load_model
from limbeck.pipeline.checks import _check_sharding as check_sharding
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.initial_student import build_initial_student
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import stored_signals
from limbeck.pipeline.store_capture import capture
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.runtime.console import QuietConsole
from limbeck.runtime.files import read_json
from limbeck.types import DenseSignal, LimbeckError, TopKSignal
from tests.teachers.scoring_server import ScoringHandler, scoring_server
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

S = 20
Pair = tuple[TinyPair, int, str, type[ScoringHandler]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A teacher, the number of its tokens, and a server with it."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("pair")
    teacher = write_model(folder / "teacher")
    loaded = load_model(str(teacher))
    rows = [{"prompt": text, "completion": f"An answer to {text}"} for text in questions(12)]
    tiny = TinyPair(teacher=teacher, prompts=write_prompts(folder / "prompts.jsonl", rows))

    def scores(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    with scoring_server(Tokenizer.from_file(str(teacher / "tokenizer.json")), scores) as (handler, url, _):
        yield tiny, len(loaded.tokenizer), url, handler


def tree_of(pair: Pair, output: Path, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "objective": {"name": "rkl", "temperature": 2.0},
        "responses": {"source": "teacher"},
        "evaluate": {"groups": {"fidelity": {"whose": ["responses"]}}},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    tree = pair[0].tree(output, **base)
    tree["train"] |= {"max_steps": 3, "logging_steps": 1}
    return tree


def losses_of(root: Path) -> list[float]:
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("source", "sees"),
    [("teacher", "prompt"), ("student", "system"), ("mixed", "prompt"), ("speculative", "prompt")],
)
def test_with_all_tokens_losses_are_those_of_the_whole_distribution(
    pair: Pair, tmp_path: Path, source: str, sees: str
) -> None:
    """At a temperature other than 1: log Z is known; held-out answers are kept whole. The student chooses behind its
    own prompt, whatever the teacher sees."""
    found, scores = [], []
    for support in ("full", "topk_tail"):
        teacher: dict[str, Any] = {"support": support}
        if sees == "system":
            teacher["sees"] = {"name": "system", "text": "You know all."}
        teacher |= {} if support == "full" else {"support_k": pair[1] - S, "student_k": S}
        tree = tree_of(pair, tmp_path / support, teacher=teacher, responses={"source": source})
        run = run_pipeline(load_recipe(tree), stages=STAGES)
        found.append(losses_of(run.root))
        scores.append(read_json(run.root / "scores.json")["after"]["forward_kl"]["mean"])
    assert len(found[0]) == 3 and found[1] == pytest.approx(found[0], rel=1e-4)
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_what_the_student_begins_with_is_what_chooses(pair: Pair, tmp_path: Path) -> None:
    """Its likeliest tokens and the teacher's are kept, held-out answers whole, and no block is measured twice."""
    tree = tree_of(pair, tmp_path / "run", teacher={"support": "topk_tail", "support_k": 4, "student_k": 3})
    recipe = load_recipe(tree)
    run = run_pipeline(recipe, stages=STAGES, until="teach")
    assert run.blocks_before.exists() and not (run.root / "blocks.json").exists()
    context = RunContext(recipe)
    student, signals = build_initial_student(context).model, stored_signals(context)
    assert (run.root / "blocks.json").read_bytes() == run.blocks_before.read_bytes()
    responses = list(load_responses(context, "train").values())[:4]
    batch = collate(responses, range(4), pad_id=0)
    signal = signals.signal(batch)
    assert isinstance(signal, TopKSignal) and signal.ids_NK.shape[1] == 7
    for model, count in ((student, 3), (context.teacher.weights().model, 4)):
        with torch.no_grad():
            logits_BTV = model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        best_NK = logits_BTV[batch.loss_mask_BT].topk(count).indices
        assert (signal.ids_NK[:, :, None] == best_NK[:, None]).any(1).all()
    held = list(load_responses(context, "heldout").values())[:2]
    assert isinstance(signals.signal(collate(held, range(2), pad_id=0)), DenseSignal)
    (run.root / "blocks.json").unlink()
    run = run_pipeline(recipe, stages=STAGES)
    assert not list(run.root.glob("superseded*")), "nothing was moved aside"
    assert (run.root / "blocks.json").read_bytes() == run.blocks_before.read_bytes()
    assert len(losses_of(run.root)) == 3


@pytest.mark.parametrize("source", ["data", "student"])
def test_a_server_is_asked_for_the_students_choice(pair: Pair, tmp_path: Path, source: str) -> None:
    """With all tokens the losses are those of the model in this process; nothing is asked twice."""
    _, size, url, handler = pair
    found = []
    answers = {"source": source} | ({"initial_author": "data"} if source == "student" else {})
    for where in ("in_process", {"name": "server", "base_url": url, "retries": 0, "timeout_s": 20.0}):
        here = where == "in_process"
        write_model(tmp_path / "student", layers=2, seed=1)
        teacher: dict[str, Any] = {"where": where}
        teacher |= {} if here else {"support": "topk_tail", "support_k": size - S, "student_k": S}
        tree = tree_of(
            pair,
            tmp_path / ("local" if here else "served"),
            teacher=teacher,
            responses=answers,
            student={"init": "pretrained", "layers": None, "model": str(tmp_path / "student")},
            objective={"temperature": 1.0},
        )
        handler.state.requests = []
        run = run_pipeline(load_recipe(tree), stages=STAGES)
        found.append(losses_of(run.root))
    asked = [json.dumps(body) for body in handler.state.requests if "token_ids" in body]
    assert len(asked) == len(set(asked)) > 10 and not run.asked.exists()
    assert len(found[0]) == 3 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_store_is_captured_with_the_students_choice(pair: Pair, tmp_path: Path) -> None:
    """And read as one of so many tokens as it has; that of another student is another store."""
    choice = {"support": "topk_tail", "support_k": 4, "student_k": 3}
    recipe = load_recipe(tree_of(pair, tmp_path / "texts", teacher=choice))
    done = capture(recipe, tmp_path / "store", None, console=QuietConsole())
    again = capture(recipe, tmp_path / "store", None, console=QuietConsole())
    assert done.added > 0 == again.added and again.found == done.added
    write_model(tmp_path / "student", layers=2, seed=1)
    student = {"init": "pretrained", "layers": None, "model": str(tmp_path / "student")}
    stored = {"support": "topk_tail", "support_k": 7, "where": {"name": "store", "path": str(tmp_path / "store")}}
    sections = {"teacher": stored, "student": student, "evaluate": {"groups": {"fidelity": {"whose": ["responses"]}}}}
    run = run_pipeline(load_recipe(tree_of(pair, tmp_path / "run", **sections)), stages=STAGES)
    assert len(losses_of(run.root)) == 3
    other = load_recipe(tree_of(pair, tmp_path / "other", teacher=choice, student=student))
    with pytest.raises(LimbeckError, match="students_tokens"):
        capture(other, tmp_path / "store", None, console=QuietConsole())


SERVER = {"name": "server", "base_url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("teacher", "parts"),
    [
        ({"support": "full"}, ("student_k is 3", "support=full", "set teacher.support=topk_tail")),
        ({"support": "sampled"}, ("support=sampled", "set teacher.support=topk_tail")),
        ({"where": SERVER | {"api": "llamacpp"}}, ("llama.cpp", "vLLM or SGLang")),
        ({"where": SERVER | {"gives": "hidden"}}, ("gives=hidden", "support=full")),
        ({"where": {"name": "store", "path": "x"}}, ("what was captured", "set teacher.support_k=7")),
        ({"cache": False}, ("teacher.cache is false",)),
        ({"support_k": 298}, ("support_k is 298 and teacher.student_k 3", "lower it")),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(
    pair: Pair, tmp_path: Path, teacher: dict[str, Any], parts: tuple[str, ...]
) -> None:
    teacher = {"support": "topk_tail", "support_k": 4, "student_k": 3} | teacher
    with pytest.raises(LimbeckError) as error:
        run_pipeline(load_recipe(tree_of(pair, tmp_path / "run", teacher=teacher)), stages=STAGES)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("student", "set teacher.student_k=0, or train.sharding=none"),
        ("replay", "set teacher.student_k=0, or train.sharding=none"),
        ("pairs", "set responses.source.resample_teacher=false, or train.sharding=none"),
        ({"name": "pairs", "resample_teacher": False}, ""),
        ({"name": "mixed", "refresh": "epoch"}, ""),
        ("teacher", ""),
    ],
)
def test_a_sharded_student_chooses_where_it_is_whole(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, remedy: str
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    sections: dict[str, Any] = {"responses": {"source": source}, "train": {"sharding": "full"}}
    choice = {"support": "topk_tail", "support_k": 4, "student_k": 3}
    context = RunContext(load_recipe(tree_of(pair, tmp_path / "run", teacher=choice, **sections)))
    if not remedy:
        check_sharding(context)
        return
    with pytest.raises(LimbeckError) as error:
        check_sharding(context)
    assert "\n" not in str(error.value) and "student_k is 3" in str(error.value) and remedy in str(error.value)
