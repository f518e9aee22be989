"""Answers that must be right: of all attempts few are in memory at a time, and those that are kept are the same."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from limbeck.evaluation.tasks.marking import AnswerMark
from limbeck.evaluation.tasks.problems import Problem
from limbeck.pipeline import verified_responses
from limbeck.rollouts.asked import scratch_table
from limbeck.rollouts.table import keep_columns, open_responses
from limbeck.types import Response, TokenPrompt

COUNT = 300


def prompts() -> Iterator[TokenPrompt]:
    for number in range(COUNT):
        yield TokenPrompt(id=f"p{number}", ids=(1, number), split="heldout" if number % 10 == 0 else "train")


def answers(folder: Path, asked: Sequence[TokenPrompt], attempt: int) -> Sequence[Response]:
    """The answers of an attempt on disk; the last id says in which attempt it is right."""
    path = folder / f"attempt-{attempt}.jsonl"
    keep_columns(
        path.with_suffix(".arrow"),
        (
            Response(
                prompt_id=prompt.id,
                author="teacher",
                prompt_ids=prompt.ids,
                response_ids=(attempt, prompt.ids[1] % 4),
                stop="eos",
                split=prompt.split,
            )
            for prompt in asked
        ),
    )
    return open_responses(path)


def in_memory() -> int:
    gc.collect()
    return sum(type(one) is Response for one in gc.get_objects())


def test_few_answers_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter is right at once, a quarter in the second attempt, a quarter in the third, and one never."""
    most = 0

    def marks(some: Sequence[tuple[Problem, str]], *_: Any, **__: Any) -> list[AnswerMark]:
        nonlocal most
        most = max(most, in_memory())
        rights = [text.split() for _, text in some]
        return [AnswerMark(failure=None if a == b else "wrong", extraction="text") for a, b in rights]

    monkeypatch.setattr(verified_responses, "mark_answers", marks)
    monkeypatch.setattr(verified_responses, "MARKED_AT_A_TIME", 16)
    problems = {p.id: Problem(id=p.id, task="math", request="", plain="", answer="") for p in prompts()}
    monkeypatch.setattr(verified_responses, "_math_problems", lambda *_: problems)
    monkeypatch.setattr(verified_responses, "text_behind", lambda r, _: " ".join(map(str, r.response_ids)))
    said: list[str] = []
    console = SimpleNamespace(say=said.append, meter=lambda *_: _Meter())
    section = SimpleNamespace(by="math", samples=3, unverified="drop", timeout_s=1.0, memory_mb=64)
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(responses=SimpleNamespace(verify=section)),
        console=console,
        run=SimpleNamespace(responses=tmp_path),
    )
    asked, before = scratch_table(tmp_path, prompts()), in_memory()
    first = answers(tmp_path, asked, 0)
    asked_again: list[int] = []

    def write_again(some: Sequence[TokenPrompt], attempt: int) -> Sequence[Response]:
        asked_again.append(len(some))
        return answers(tmp_path, some, attempt)

    kept, record = verified_responses.verified(context, first, asked, None, write_again)
    found = {}
    for response in kept:
        most = max(most, in_memory() if len(found) % 50 == 0 else 0)
        found[response.prompt_id] = (response.split, response.response_ids)
    assert most - before <= 2, "each is read where it is marked, and where it is handed on"
    train = [p for p in prompts() if p.split == "train"]
    right = {p.id: p.ids[1] % 4 for p in train}
    assert asked_again == [sum(r > 0 for r in right.values()), sum(r > 1 for r in right.values())]
    assert list(found) == [p.id for p in prompts() if p.split == "heldout" or right[p.id] < 3]
    for name, (split, ids) in found.items():
        assert ids[0] == (0 if split == "heldout" else right[name])
    assert record["verified"]["by_attempt"] == [sum(r == n for r in right.values()) for n in range(3)]
    assert record["verified"]["left_out"] == sum(r == 3 for r in right.values())


class _Meter:
    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def advance(self, count: int) -> None:
        return
