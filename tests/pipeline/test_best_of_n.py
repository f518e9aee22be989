"""Best of n answers, whoever the author is: against a reference column, or by a judge."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from limbeck.evaluation.context import response_text
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import read_json
from limbeck.types import LimbeckError, Response
from tests.evaluation.judge_server import judging
from tests.teachers.hosted_service import MODEL, PRICE, Bill, hosted_service
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

ASKED = questions(12)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": text, "completion": "As follows.", "result": f"\\boxed{{{i}}}"} for i, text in enumerate(ASKED)]
    return TinyPair(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl", rows))


@pytest.fixture
def service() -> Iterator[tuple[str, Bill]]:
    """A service that is right about a third of the prompts at once, of a third at the second try, else never."""
    with hosted_service() as (url, bill):
        tries, lock = Counter[str](), threading.Lock()

        def write(asked: str, limit: int) -> tuple[str, int, str]:
            with lock:
                tries[asked] += 1
            number = ASKED.index(asked)
            right = number % 3 == 0 or (number % 3 == 1 and tries[asked] == 2)
            return (f"#### {number if right else 777}", 5, "stop")

        bill.write = write
        yield url, bill


def tree_of(pair: TinyPair, output: Path, author: str, url: str, **verify: Any) -> dict[str, Any]:
    responses: dict[str, Any] = {"source": "teacher", "max_new_tokens": 16}
    responses["verify"] = {"samples": 3, "by": "math", "column": "result"} | verify
    tree = pair.tree(output, objective={"name": "ce"}, responses=responses)
    tree["teacher"] |= {"cache": False}
    tree["student"] = {"init": "pretrained", "model": str(pair.teacher)}
    tree["evaluate"] |= {"groups": ["nll"]}
    tree["train"]["max_steps"] = 2
    if author == "hosted":
        where = {"name": "api", "base_url": url, "budget_usd": 50.0, "price_per_million": list(PRICE)}
        tree["teacher"] = {"model": MODEL, "cache": False, "where": where}
    if author == "server":
        tree["responses"]["server"] = {"base_url": url, "model": MODEL, "api": "chat", "retries": 0}
    return tree


def texts(pair: TinyPair, responses: list[Response]) -> dict[str, str]:
    tokenizer = AutoTokenizer.from_pretrained(pair.teacher)
    return {r.prompt_id: response_text(r, tokenizer) for r in responses if r.split == "train"}


@pytest.mark.parametrize("author", ["hosted", "server"])
def test_the_next_answer_is_asked_for_where_none_was_right(
    pair: TinyPair, tmp_path: Path, service: tuple[str, Bill], author: str
) -> None:
    url, bill = service
    run = run_pipeline(load_recipe(tree_of(pair, tmp_path / "run", author, url)), stages=STAGES)
    responses = read_responses(run.responses / "teacher.jsonl")
    record = read_json(run.root / "stages/respond.json")["verified"]
    held = len({r.prompt_id for r in responses if r.split == "heldout"})
    assert record["prompts"] == len(ASKED) - held and record["by"] == "math"
    first, second, third = record["by_attempt"]
    assert first > 0 < second and third == 0 and record["right"] == first + second
    assert record["left_out"] == record["prompts"] - record["right"] > 0
    assert len(bill.charged) == len(ASKED) + (record["prompts"] - first) + record["left_out"]
    kept = texts(pair, responses)
    assert len(kept) == record["right"] and not any("777" in text for text in kept.values())
    report = run.report.read_text("utf-8")
    assert f"for {record['right']} of {record['prompts']} training prompts" in report
    # With the other option prompts without a right answer keep their first one.
    asked = len(bill.charged)
    tree = tree_of(pair, tmp_path / "kept", author, url, unverified="keep", samples=1)
    run = run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
    kept = texts(pair, read_responses(run.responses / "teacher.jsonl"))
    wrong = sum("777" in text for text in kept.values())
    found = read_json(run.root / "stages/respond.json")["verified"]
    assert len(kept) == found["prompts"] and wrong == found["prompts"] - found["right"] > 0
    assert len(bill.charged) == asked + len(ASKED)


def test_a_judge_chooses_among_several_answers(pair: TinyPair, tmp_path: Path) -> None:
    with judging() as (url, state):
        judge = {"base_url": url, "concurrency": 2}
        tree = tree_of(pair, tmp_path / "run", "local", "", by="judge", judge=judge, column=None)
        run = run_pipeline(load_recipe(tree), stages=STAGES)
        written = [
            texts(pair, [r for path in sorted((run.responses / folder).glob("*.jsonl")) for r in read_responses(path)])
            for folder in ("batches", "attempt-1", "attempt-2")
        ]
        chosen = texts(pair, read_responses(run.responses / "teacher.jsonl"))
        assert len(chosen) == len(written[0]) == len(written[1]) == len(written[2])
        # The judge finds the longer of two the better.
        for prompt, text in chosen.items():
            assert len(text.strip()) == max(len(one[prompt].strip()) for one in written)
        record = read_json(run.root / "stages/respond.json")["verified"]
        assert record["right"] == len(chosen) == sum(record["by_attempt"]) and record["by"] == "judge"
        assert sum(record["by_attempt"][1:]) > 0 and len(state.judged) == 6 * len(chosen)
        assert f"for {len(chosen)} of {len(chosen)} training prompts" in run.report.read_text("utf-8")


@pytest.mark.parametrize(
    ("verify", "said"),
    [
        ({"column": "nothing"}, "'nothing'"),
        ({"column": None}, "no reference answer"),
        ({"by": "judge", "column": None}, "responses.verify.by is judge and responses.verify.judge is missing"),
        ({"by": "judge"}, "responses.verify.column is for responses.verify.by=math, but it is judge"),
        (
            {"judge": {"base_url": "http://localhost:9"}},
            "responses.verify.by is math and responses.verify.judge is given",
        ),
        (
            {"by": "judge", "column": None, "judge": {"base_url": "http://127.0.0.1:9/v1"}},
            "cannot be reached (Connection refused); start the server, or correct responses.verify.judge.base_url",
        ),
        (
            {"by": "judge", "column": None, "samples": 1, "judge": {"base_url": "http://127.0.0.1:9/v1"}},
            "chooses among several answers, but responses.verify.samples is 1",
        ),
    ],
)
def test_what_cannot_be_checked_is_said_before_anything_is_paid(
    pair: TinyPair, tmp_path: Path, service: tuple[str, Bill], verify: dict[str, Any], said: str
) -> None:
    with pytest.raises(LimbeckError) as caught:
        tree = tree_of(pair, tmp_path / "run", "hosted", service[0], **verify)
        # A row without a reference answer.
        rows = [{"prompt": text} for text in ASKED]
        tree["prompts"]["source"] = (
            str(write_prompts(tmp_path / "rows.jsonl", rows)) if "column" in verify else tree["prompts"]["source"]
        )
        run_pipeline(load_recipe(tree), stages=STAGES)
    assert said in str(caught.value).replace(" (2 tries)", "") and "\n" not in str(caught.value)
    assert not service[1].charged
