"""The account of an on-policy training: counted by hand, and each mechanism that can stand still."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.rollouts.account import SO_FAR, count_phrase, never_acted, summary
from limbeck.types import Response


def response(author: Any, *, tokens: int = 3, replaced: int | None = None) -> Response:
    return Response(
        prompt_id="p", author=author, prompt_ids=(1,), response_ids=(4,) * tokens, stop="length", replaced=replaced
    )


def line(**so_far: float) -> dict[str, Any]:
    own = {"step": 146, "share": 0.2, "buffer": 64.0}
    return own | {f"{SO_FAR}{name}": value for name, value in so_far.items()}


def replay(**changes: float) -> dict[str, Any]:
    counts = {"responses": 584, "student": 120, "replayed": 56, "validations": 6, "rises": 2, "growths": 1}
    return line(**(counts | changes))


def test_counts_by_hand():
    first = count_phrase({}, [response("teacher"), response("student", replaced=2)], {"alpha/teacher": 0.1})
    assert first == {
        "responses": 2, "student": 1, "replaced": 2, "replaceable": 3, "alpha_low": 0.1, "alpha_high": 0.1,
    }  # fmt: skip
    means = {"alpha/teacher": 0.05, "alpha/student": 0.3}
    second = count_phrase(first, [response("student", tokens=5, replaced=0), response("data")], means)
    assert second == {
        "responses": 4, "student": 2, "replaced": 2, "replaceable": 8, "alpha_low": 0.05, "alpha_high": 0.3,
    }  # fmt: skip
    assert first["responses"] == 2
    assert count_phrase({}, [response("student")], {}) == {"responses": 1, "student": 1}


def test_a_training_in_which_all_acted_is_told_in_one_sentence():
    assert never_acted(replay()) == []
    assert summary(replay()) == (
        "the student wrote 120 of 584 responses that were trained on, 56 of them out of the buffer; its share "
        "grew once in 6 comparisons of the held-out loss, to 0.2"
    )
    skd = line(responses=584, student=584, replaced=7, replaceable=30_000)
    assert never_acted(skd) == [] and summary(skd).endswith("the teacher replaced 7 of 30,000 tokens")
    pairs = line(responses=584, student=292, rounds=2, alpha_low=0.044, alpha_high=0.1)
    assert never_acted(pairs) == []
    assert summary(pairs).endswith("they were written 2 times; alpha moved between 0.044 and 0.1, means of a step")


@pytest.mark.parametrize("metrics", [{}, {"step": 3, "loss": 1.0}, line(responses=0.0)])
def test_nothing_is_said_where_nobody_counted(metrics: dict[str, Any]):
    assert summary(metrics) == "" and never_acted(metrics) == []


@pytest.mark.parametrize(
    ("metrics", "sentences"),
    [
        (
            line(responses=584, student=0) | {"share": 0.001},
            ["the student wrote 0 of 584 responses: its share of the steps is 0.001; raise responses.source.share"],
        ),
        (
            replay(student=0, replayed=0, rises=0, growths=0) | {"share": 0.0, "buffer": 0.0},
            [
                "the student wrote 0 of 584 responses: its share of the steps is 0; raise responses.source.share",
                "the buffer replayed 0 responses: it is drawn from once it is full and held 0 at the end; "
                "lower responses.source.capacity, or raise responses.source.share",
                "the share never grew from 0: the held-out loss fell in each of 6 validations",
            ],
        ),
        (
            replay(growths=0),
            [
                "the share never grew from 0.2: the held-out loss rose in 2 of 6 validations, but never as far as "
                "responses.source.tolerance asks"
            ],
        ),
        (
            replay(growths=0, rises=0, validations=0),
            [
                "the share never grew from 0.2: the held-out loss was not measured again after the first step; "
                "lower responses.source.validate_steps"
            ],
        ),
        (replay(growths=0) | {"share": 1.0}, []),
        (
            line(responses=584, student=584, replaced=0, replaceable=30_000),
            [
                "the teacher replaced 0 of the student's 30,000 tokens; lower responses.source.teacher_top_k, or "
                "raise responses.source.teacher_share"
            ],
        ),
        (
            line(responses=584, student=292, rounds=1, alpha_low=0.1, alpha_high=0.1),
            [
                "the adaptive alpha was 0.1 in every step; train for more epochs than its warmup_epochs, or lower its "
                "`low`",
                "the student's responses were written once, before step 1 of 146, and never again; "
                "lower responses.source.refresh, or raise train.num_train_epochs",
            ],
        ),
    ],
)
def test_what_never_acted_is_named(metrics: dict[str, Any], sentences: list[str]):
    assert never_acted(metrics) == sentences
