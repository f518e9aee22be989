"""A judge that is read by the probabilities of its letters: what they make of a pair, and what cannot be read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.client.openai import Server
from limbeck.evaluation.judge.asking import Judge, NoLogprobsError
from limbeck.evaluation.judge.letters import read_letters
from limbeck.evaluation.judge.log import JudgementLog
from limbeck.evaluation.judge.opinions import Opinion
from limbeck.evaluation.judge.questions import AnswerPair, estimate, questions_of
from limbeck.evaluation.judge.verdicts import JudgedPair, score_pairs, summarise_pairs
from limbeck.types import LimbeckError
from tests.evaluation.judge_server import JUDGE, JudgeState, judging, lengths

PAIRS = [
    AnswerPair(id=f"p{i}", request=f"What is {i}?", student=f"S{i}", other=f"O{i} at length" * (1 + i % 2))
    for i in range(6)
]
QUESTIONS = [question for orders in questions_of(PAIRS, JUDGE, "logprobs") for question in orders]


@pytest.fixture
def state() -> Iterator[JudgeState]:
    with judging() as (url, state):
        state.key = None
        state.url = url  # type: ignore[attr-defined]
        yield state


@pytest.fixture
def judge(state: JudgeState) -> Judge:
    url = state.url  # type: ignore[attr-defined]
    server = Server(base_url=url, timeout_s=5, retries=1, backoff_s=0.02, section="evaluate.groups.judge")
    return Judge(server=server, model=JUDGE, max_new_tokens=64, concurrency=1)


def reply(logprobs: Any, said: str | None = "A", **more: Any) -> dict[str, Any]:
    """A chat completion of one token."""
    return {
        "choices": [{"finish_reason": "length", "message": {"content": said} | more, "logprobs": logprobs}],
    }


def first(*likeliest: tuple[Any, Any]) -> dict[str, Any]:
    return {"content": [{"token": "A", "top_logprobs": [{"token": t, "logprob": p} for t, p in likeliest]}]}


def log(p: float) -> float:
    return math.log(p)


def opinion(a: float, b: float) -> Opinion:
    return read_letters(reply(first(("A", log(a)), ("B", log(b)))))


def test_all_tokens_of_a_letter_are_added_up_and_others_left_out() -> None:
    found = read_letters(
        reply(first((" B", log(0.3)), ("A", log(0.2)), ("▁B", log(0.1)), ("b", log(0.1)), ("AB", -2), ("\nA", -9999)))
    )
    assert found.verdict == "B" and found.unread is None and found.probabilities is not None
    assert found.probabilities == {"A": pytest.approx(0.2), "B": pytest.approx(0.4)}
    assert found.leaning == pytest.approx(1 / 3) and found.mass == pytest.approx(0.6)
    assert opinion(0.4, 0.4).verdict == "C"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (reply(first(("A", log(0.004)), ("B", log(0.005)))), "faint"),
        (reply(first(("The", -0.1), ("C", -3.0))), "faint"),
        (reply(None), "bare"),
        (reply({}), "bare"),
        (reply({"content": None}), "bare"),
        (reply({"content": []}), "bare"),
        (reply({"content": [None]}), "bare"),
        (reply({"content": [{"token": "A", "logprob": -0.1, "top_logprobs": []}]}), "bare"),
        (reply(first(("A", math.nan), (7, -1.0), ("B", "-1"))), "bare"),
        (reply(first(("A", -0.1)), None, refusal="I cannot judge this."), "refused"),
    ],
    ids=str,
)
def test_what_is_unread(said: dict[str, Any], why: str) -> None:
    found = read_letters(said)
    assert (found.verdict, found.unread, found.leaning) == (None, why, None)


def test_numbers_out_of_all_bounds_are_no_traceback() -> None:
    found = read_letters(reply(first(("A", 10**400), ("B", -(10**400)), (" A", math.inf), (" B", -math.inf))))
    assert found.verdict == "A" and found.probabilities == {"A": 1.0, "B": 0.0}
    with pytest.raises(LimbeckError, match="expected a chat completion"):
        read_letters({"choices": []})


def test_a_pair_counts_the_mean_over_both_orders() -> None:
    def pair(one: Opinion, other: Opinion, name: str = "p") -> JudgedPair:
        return JudgedPair(id=name, first=one, second=other, lengths=(1, 2))

    # Sure of the student; swayed by the place, but less so where the student is second; a mirror of itself.
    pairs = [
        pair(opinion(0.8, 0.1), opinion(0.3, 0.6), "sure"),
        pair(opinion(0.6, 0.2), opinion(0.5, 0.4), "swayed"),
        pair(opinion(0.7, 0.2), opinion(0.7, 0.2), "same"),
    ]
    rows = {row.id: row.values for row in score_pairs(pairs, "win_rate", "logprobs")}
    assert rows["sure"]["win_rate"] == pytest.approx((8 / 9 + 6 / 9) / 2)
    assert rows["swayed"]["win_rate"] == pytest.approx((6 / 8 + 4 / 9) / 2)
    assert rows["same"] == {"win_rate": 0.5, "judge_ties": 1.0, "judge_consistency": 0.0, "judge_leans": 0.5}
    assert [rows[name]["judge_consistency"] for name in ("sure", "swayed")] == [1.0, 0.0]
    told = summarise_pairs(pairs)
    assert (told["wins"], told["losses"], told["ties_in_both_orders"], told["orders_disagree"]) == (1, 0, 0, 2)
    leanings = [8 / 9, 3 / 9, 6 / 8, 5 / 9, 7 / 9, 7 / 9]
    assert told["letters"] == {"first_place": pytest.approx(sum(leanings) / 6), "mass": pytest.approx(5.3 / 6)}
    unread = [pair(opinion(0.8, 0.1), opinion(0.001, 0.001))]
    with pytest.raises(LimbeckError, match=r"next to no probability of A or B.*expected A or B as its first token"):
        score_pairs(unread, "win_rate", "logprobs")


def test_one_token_is_asked_for_with_the_likeliest(judge: Judge, state: JudgeState) -> None:
    judge.require_logprobs()
    found = list(judge.ask(QUESTIONS))
    assert len(found) == len(state.judged) == len(QUESTIONS)
    for body in state.requests:
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (1, True, 20, 0.0)
    for judgement in found:
        pair = next(one for one in PAIRS if one.id == judgement.pair_id)
        a, b = (pair.student, pair.other) if judgement.student_first else (pair.other, pair.student)
        expected = lengths(a, b)
        assert judgement.opinion.probabilities == {
            "A": pytest.approx(expected["A"] + expected[" A"]),
            "B": pytest.approx(expected["B"]),
        }
        assert judgement.max_new_tokens == 1
    assert estimate(QUESTIONS, 64).output_tokens == len(QUESTIONS)


def test_a_server_that_gives_fewer_is_asked_for_fewer(judge: Judge, state: JudgeState) -> None:
    state.most_top = 5
    assert all(judgement.opinion.verdict for judgement in judge.ask(QUESTIONS))
    assert [body["top_logprobs"] for body in state.requests] == [20, *[5] * len(QUESTIONS)]


@pytest.mark.parametrize(
    ("letters", "most_top", "faults", "said"),
    [
        (lengths, 0, [], "HTTP 400: Requested sample logprobs of 5"),
        (None, 20, [], "it answers .* without them"),
        (lengths, 20, [{"status": 422, "body": {"detail": "Unexpected fields: {'top_logprobs'}"}}] * 2, "HTTP 422"),
    ],
)
def test_a_server_without_them_is_refused_in_one_line(
    judge: Judge, state: JudgeState, letters: Any, most_top: int, faults: list[Any], said: str
) -> None:
    state.letters, state.most_top = letters, most_top
    for ask in (judge.require_logprobs, lambda: list(judge.ask(QUESTIONS))):
        state.faults = list(faults)
        with pytest.raises(NoLogprobsError, match=rf"gives no log-probabilities \({said}") as caught:
            ask()
        assert "or set evaluate.groups.judge.verdict=text" in str(caught.value) and "\n" not in str(caught.value)


def test_one_reply_without_them_is_asked_again(judge: Judge, state: JudgeState, tmp_path: Path) -> None:
    state.faults = [None, None, {"status": 200, "body": reply(None)}]
    record = JudgementLog.open(tmp_path / "log.jsonl")
    for judgement in judge.ask(QUESTIONS):
        record.add(judgement)
    again = JudgementLog.open(record.path)
    assert again.known == record.known and len(again.known) == len(QUESTIONS)
    assert [j.opinion.unread for j in again.known.values() if j.opinion.unread] == ["bare"]
    assert len([q for q in QUESTIONS if not again.holds(q.key, 64)]) == 1


def test_verdicts_in_text_and_letters_never_mix(judge: Judge, tmp_path: Path) -> None:
    """The keys of verdicts in text are those that old records hold."""
    pair = AnswerPair(id="p", request="What is 1?", student="One.", other="Two {x}.")
    text, letters = (questions_of([pair], JUDGE, verdict)[0] for verdict in ("text", "logprobs"))
    assert [question.key for question in text] == [
        "4bcaccd84543df71ba392055d19a6c66d939c3a72d6f15e27953541d83c33813",
        "d7e36a15355237f4d7b0e9cd199e7b586882be939de19ce2cbcc6782d225531a",
    ]
    assert len({question.key for question in (*text, *letters)}) == 4
    record = JudgementLog.open(tmp_path / "log.jsonl")
    for judgement in judge.ask([*text, *letters]):
        record.add(judgement)
    lines = [json.loads(line) for line in record.path.read_text().splitlines()]
    kept = {line["key"]: line["opinion"] for line in lines}
    assert all(kept[question.key].keys() == {"text", "verdict", "unread"} for question in text)
    assert all(kept[question.key]["probabilities"].keys() == {"A", "B"} for question in letters)
    assert JudgementLog.open(record.path).known == record.known


@pytest.mark.parametrize("probabilities", [[0.5, 0.5], {"A": 0.5}, {"A": 0.5, "B": "x"}, {"A": 0.5, "B": 2.0}, 1])
def test_a_damaged_probability_is_named(judge: Judge, tmp_path: Path, probabilities: Any) -> None:
    record = JudgementLog.open(tmp_path / "log.jsonl")
    record.add(next(judge.ask(QUESTIONS[:1])))
    line = json.loads(record.path.read_text())
    line["opinion"]["probabilities"] = probabilities
    record.path.write_text(json.dumps(line) + "\n")
    with pytest.raises(LimbeckError, match=r"log\.jsonl:1 is damaged .*delete the line"):
        JudgementLog.open(record.path)
