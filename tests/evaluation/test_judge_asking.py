"""Asking a judge: what it reads, what is kept, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.client.openai import Server
from limbeck.evaluation.judge.asking import Judge
from limbeck.evaluation.judge.log import Judgement, JudgementLog, used
from limbeck.evaluation.judge.questions import AnswerPair, estimate, questions_of
from limbeck.types import LimbeckError
from tests.evaluation.judge_server import JUDGE, JudgeState, always_a, answers_in, judging
from tests.evaluation.odd_replies import HALF, ODD, completion

PAIRS = [
    AnswerPair(id=f"p{i}", request=f"What is {i}?", student=f"S{i}", other=f"O{i} {{at}} length" * (i % 3))
    for i in range(10)
]
QUESTIONS = [question for orders in questions_of(PAIRS, JUDGE) for question in orders]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, JudgeState]]:
    with judging() as served:
        yield served


@pytest.fixture
def state(running: tuple[str, JudgeState]) -> JudgeState:
    """Well behaved, with an empty record."""
    fresh = JudgeState(tokenizer=running[1].tokenizer, models=[JUDGE])
    for name, value in vars(fresh).items():
        setattr(running[1], name, value)
    return running[1]


@pytest.fixture
def judge(running: tuple[str, JudgeState], state: JudgeState) -> Judge:
    del state
    server = Server(base_url=running[0], timeout_s=5, retries=1, backoff_s=0.02, section="evaluate.groups.judge")
    return Judge(server=server, model=JUDGE, max_new_tokens=64, concurrency=4)


def asked(judge: Judge, **options: Any) -> dict[str, Judgement]:
    return {judgement.key: judgement for judgement in judge.ask(QUESTIONS, **options)}


def test_each_pair_is_read_in_both_orders(judge: Judge, state: JudgeState) -> None:
    state.delay_s = 0.02
    found = asked(judge)
    assert found.keys() == {question.key for question in QUESTIONS} and len(found) == 20
    expected = {(p.student, p.other) for p in PAIRS} | {(p.other, p.student) for p in PAIRS}
    assert {answers_in(text) for text in state.judged} == expected
    for question in QUESTIONS:
        pair = next(p for p in PAIRS if p.id == question.pair_id)
        assert pair.request in question.text
        assert answers_in(question.text)[0 if question.student_first else 1] == pair.student
    assert all(r["temperature"] == 0 and r["max_tokens"] == 64 and r["model"] == JUDGE for r in state.requests)
    assert 1 < state.most <= 4


def test_the_key_is_of_everything_that_makes_the_reply() -> None:
    keys = {question.key for question in QUESTIONS}
    assert len(keys) == 20
    changed = [
        questions_of(PAIRS, "another"),
        questions_of(
            [AnswerPair(id=p.id, request=p.request + " ", student=p.student, other=p.other) for p in PAIRS], JUDGE
        ),
        questions_of(
            [AnswerPair(id=p.id, request=p.request, student=p.student + " ", other=p.other) for p in PAIRS], JUDGE
        ),
    ]
    for orders in changed:
        assert keys.isdisjoint(question.key for both in orders for question in both)
    same = questions_of([AnswerPair(id="x", request="q", student="one", other="one")], JUDGE)
    assert same[0][0].key == same[0][1].key, "the same text is asked once"


def test_the_estimate_is_an_upper_bound_of_what_is_written() -> None:
    guess = estimate(QUESTIONS, 64)
    assert (guess.requests, guess.output_tokens) == (20, 20 * 64)
    assert guess.input_tokens == pytest.approx(sum(len(q.text) for q in QUESTIONS) / 4, abs=20)


def test_the_log_keeps_what_was_said(judge: Judge, tmp_path: Path) -> None:
    log = JudgementLog.open(tmp_path / "log.jsonl")
    assert not log.has_verdict_of(JUDGE)
    for judgement in asked(judge).values():
        log.add(judgement)
    with log.path.open("ab") as file:
        file.write(b'{"key": "half a li')
    again = JudgementLog.open(log.path)
    assert again.known == log.known and again.has_verdict_of(JUDGE) and not again.has_verdict_of("another")
    assert log.path.read_bytes().count(b"\n") == 20 and log.path.read_bytes().endswith(b"\n")
    counted = used(list(again.known.values()))
    assert counted == {"replies": 20, "prompt_tokens": 2000, "completion_tokens": 200, "uncounted_replies": 0}


_LINE = {
    "key": "k", "pair_id": "p", "student_first": True, "model": "m", "opinion": {"text": "t", "verdict": "A"},
    "max_new_tokens": 1, "greedy": True, "prompt_tokens": 1, "completion_tokens": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "[1]", "no", '{"key": "k", "opinion": {"text": "t"}}', "[" * 10**5 + "]" * 10**5, "1" * 5000),
        *(
            json.dumps(_LINE | {name: value})
            for name in _LINE
            for value in ([7], {"a": 1})
            if name not in ("student_first", "greedy")
        ),
        json.dumps(_LINE | {"opinion": {"text": 3, "verdict": "A"}}),
        json.dumps(_LINE | {"opinion": {"text": "t", "verdict": ["A"]}}),
    ],
)
def test_a_damaged_log_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(LimbeckError, match=r"log\.jsonl:1 is damaged .*delete the line"):
        JudgementLog.open(path)


def test_a_reply_that_was_cut_off_is_asked_again_with_more_room(
    judge: Judge, state: JudgeState, tmp_path: Path
) -> None:
    log = JudgementLog.open(tmp_path / "log.jsonl")
    state.finish = "length"
    for judgement in asked(judge).values():
        assert judgement.opinion.unread == "truncated"
        log.add(judgement)
    key = QUESTIONS[0].key
    assert log.holds(key, 64) and not log.holds(key, 65) and not log.holds("another", 64)


def test_usage_may_be_missing(judge: Judge, state: JudgeState) -> None:
    state.counts = False
    assert used(list(asked(judge).values()))["uncounted_replies"] == 20


@pytest.mark.parametrize("fault", [{"status": 429, "headers": {"Retry-After": "0"}}, {"status": 503}, "cut", "garbage"])
def test_what_passes_is_tried_again(judge: Judge, state: JudgeState, fault: Any) -> None:
    state.faults = [fault, None, fault]
    assert all(judgement.opinion.verdict for judgement in asked(judge).values())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 503}, r"cannot answer \(HTTP 503: as ordered\) \(2 tries\); .* the same command then continues"),
        ({"status": 429}, r"lower evaluate\.groups\.judge\.concurrency"),
        ("garbage", r"expected a JSON object \(2 tries\); check that evaluate\.groups\.judge\.base_url"),
        ({"status": 401}, r"does not let us in .*with evaluate\.groups\.judge\.api_key_env"),
        ({"status": 301, "headers": {"Location": "http://x/v1"}}, r"give that as evaluate\.groups\.judge\.base_url"),
        ({"status": 404}, r"declines to judge \(HTTP 404: as ordered\); correct evaluate\.groups\.judge\.model"),
        ({"status": 402}, r"declines to judge \(HTTP 402: as ordered\)"),
        (
            {"status": 200, "body": {"id": 7}},
            r"expected a chat completion; check that evaluate\.groups\.judge\.base_url",
        ),
    ],
    ids=str,
)
def test_what_lasts_keeps_what_is_there_and_is_said_in_one_line(
    judge: Judge, state: JudgeState, fault: Any, said: str
) -> None:
    state.faults = [*[None] * 6, *[fault] * 60]
    got = []
    with pytest.raises(LimbeckError, match=said) as caught:
        for judgement in judge.ask(QUESTIONS):
            got.append(judgement)
    assert len(got) == len(state.judged) == 6 and "\n" not in str(caught.value)


def test_a_judge_that_is_down(judge: Judge) -> None:
    judge.server = Server(base_url="http://127.0.0.1:9/v1", retries=0, section="evaluate.groups.judge")
    with pytest.raises(
        LimbeckError, match=r"cannot be reached .*start the server, or correct evaluate\.groups\.judge\.base_url"
    ):
        asked(judge)


def test_a_pair_that_is_declined_is_a_refusal_of_that_pair(judge: Judge) -> None:
    # A server of its own: a late request of the tests before would take one of the two faults.
    with judging() as (url, state):
        judge.server = Server(base_url=url, timeout_s=5, retries=1, backoff_s=0.02, section="evaluate.groups.judge")
        state.faults = [{"status": 400, "body": {"error": "content policy"}}, None, None, {"status": 422}]
        found = [judgement.opinion for judgement in asked(judge).values()]
    refused = sorted(opinion.text for opinion in found if opinion.unread == "refused")
    assert refused == ["HTTP 400: content policy", "HTTP 422: as ordered"] and len(found) == 20


def test_refusals_alone_at_the_start_are_an_error_and_kept_nowhere(judge: Judge, state: JudgeState) -> None:
    state.faults = [{"status": 400, "body": {"error": "no chat here"}}] * 20
    got = []
    with pytest.raises(LimbeckError, match=r"declines the first 8 requests \(HTTP 400: no chat here\); correct evalu"):
        for judgement in judge.ask(QUESTIONS):
            got.append(judgement)
    assert not got
    state.faults = [{"status": 400}] * 40
    assert {j.opinion.unread for j in asked(judge, answered_before=True).values()} == {"refused"}


def test_models_that_take_neither_max_tokens_nor_a_temperature(judge: Judge, state: JudgeState) -> None:
    """As OpenAI's reasoning models say it; what is found out once is not tried again."""
    judge.concurrency = 1
    no_limit = "Unsupported parameter: 'max_tokens' is not supported with this model."
    no_warmth = "Unsupported value: 'temperature' does not support 0 with this model."
    state.faults = [{"status": 400, "body": {"error": {"message": said}}} for said in (no_limit, no_warmth)]
    found = asked(judge)
    assert len(state.requests) == 22 and not any(judgement.greedy for judgement in found.values())
    kept = {"model", "messages", "max_completion_tokens"}
    assert [set(r) for r in state.requests[:2]] == [
        {"model", "messages", "max_tokens", "temperature"},
        kept | {"temperature"},
    ]
    assert all(set(r) == kept and r["max_completion_tokens"] == 64 for r in state.requests[2:])


def test_the_key_is_sent_and_never_said(judge: Judge, state: JudgeState, monkeypatch: pytest.MonkeyPatch) -> None:
    state.key = "s3cret"
    judge.server = Server(base_url=judge.server.base_url, api_key_env="JUDGE_KEY", section="evaluate.groups.judge")
    with pytest.raises(LimbeckError, match=r"that evaluate\.groups\.judge\.api_key_env names is not set; export it"):
        judge.server.check_key()
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    judge.server.check_key()
    state.rule = always_a
    assert "s3cret" not in json.dumps([judgement.opinion.text for judgement in asked(judge).values()])


@pytest.mark.parametrize("name", ODD)
def test_one_odd_reply_is_that_pairs_alone(name: str, judge: Judge, state: JudgeState, tmp_path: Path) -> None:
    body, unread = ODD[name]
    state.faults = [None, None, {"status": 200, "body": body}]
    log = JudgementLog.open(tmp_path / "log.jsonl")
    for judgement in asked(judge).values():
        log.add(judgement)
    kinds = [judgement.opinion.unread for judgement in log.known.values() if judgement.opinion.unread]
    assert len(log.known) == 20 and kinds == ([unread] if unread else [])
    assert JudgementLog.open(log.path).known == log.known
    counted = used(list(log.known.values()))
    assert f"{counted['prompt_tokens']:,}" in ("1,900", "2,000")
    # What is no completion may pass; everything else is kept.
    again = [question for question in QUESTIONS if not log.holds(question.key, 64)]
    assert len(again) == (unread == "odd")


def test_odd_replies_are_handed_over_when_all_have_answered(judge: Judge, state: JudgeState) -> None:
    """The first of many may come before the last good one."""
    state.faults = [None, {"status": 200, "body": {"id": 7}}]
    judge.concurrency = 1
    unread = [judgement.opinion.unread for judgement in judge.ask(QUESTIONS)]
    assert len(unread) == 20 and unread.index("odd") == 19


def test_a_reply_that_is_no_text_is_kept_as_it_came(judge: Judge, state: JudgeState, tmp_path: Path) -> None:
    state.faults = [{"status": 200, "body": completion(HALF)}]
    log = JudgementLog.open(tmp_path / "log.jsonl")
    for judgement in asked(judge).values():
        log.add(judgement)
    assert HALF in [known.opinion.text for known in JudgementLog.open(log.path).known.values()]
    # As an earlier version wrote it down: with a verdict.
    entry = json.loads(next(line for line in log.path.read_text().splitlines() if "ud800" in line))
    entry["opinion"] = {"text": HALF, "verdict": "A", "unread": None}
    log.path.write_text(json.dumps(entry) + "\n")
    (known,) = JudgementLog.open(log.path).known.values()
    assert known.opinion.unread == "garbled" and known.opinion.text == HALF


def test_a_judge_that_repeats_the_key_is_kept_without_it(
    judge: Judge, state: JudgeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-0123456789"
    monkeypatch.setenv("JUDGE_KEY", key)
    state.key, state.rule = key, lambda a, b: f"Your key is {key}. [[A]]"
    state.faults = [None, {"status": 200, "body": {"said": key}}, {"status": 400, "body": {"error": f"not with {key}"}}]
    judge.server = Server(base_url=judge.server.base_url, api_key_env="JUDGE_KEY", section="evaluate.groups.judge")
    found = asked(judge)
    assert key not in repr(found)
    assert sum("Your key is ***. [[A]]" in j.opinion.text for j in found.values()) == 18
