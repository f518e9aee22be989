"""Preference pairs: the better answer is the chosen one, and nothing is left out that is not counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.rollouts.preference.options import Answers, DataPairs, JudgePairs, SampledPairs, TeacherPairs
from limbeck.rollouts.preference.pairs import (
    LEFT_OUT,
    PairSet,
    best_and_worst,
    in_words,
    rankable,
    read_pairs,
    write_pairs,
)
from limbeck.rollouts.preference.registry import PAIRS
from limbeck.types import LimbeckError, Response, StopReason

EOS = 2


def answer(prompt: str, number: int, ids: tuple[int, ...], stop: StopReason = "eos") -> Response:
    return Response(
        prompt_id=prompt,
        author="student",
        prompt_ids=(1, 5),
        response_ids=ids,
        stop=stop,
        round=number,
    )


IDS = st.lists(st.integers(3, 5), max_size=2).map(lambda ids: (*ids, EOS))


@st.composite
def answered(draw: st.DrawFn) -> tuple[dict[str, list[Response]], dict[str, float | None]]:
    """Answers to some prompts, many of them equal or empty, with scores of which many are equal or missing."""
    answers = {
        f"p{prompt}": [answer(f"p{prompt}", n + 1, draw(IDS)) for n in range(draw(st.integers(2, 4)))]
        for prompt in range(draw(st.integers(1, 5)))
    }
    score = st.sampled_from((None, -2.0, -1.0, -1.0, -0.5))
    return answers, {response.id: draw(score) for some in answers.values() for response in some}


@given(answered(), st.sampled_from((0.0, 0.75)))
def test_the_better_is_chosen_and_all_else_is_counted(
    case: tuple[dict[str, list[Response]], dict[str, float | None]], margin: float
) -> None:
    answers, scores = case
    candidates, left_out = rankable(answers)
    pairs, more = best_and_worst(candidates, scores, margin=margin)
    counts = left_out + more
    assert set(counts) <= set(LEFT_OUT)
    lost = sum(counts[name] for name in ("prompts_one_answer", "prompts_tied", "prompts_unread"))
    assert len(pairs) + lost == len(answers)
    given_ = sum(len(some) for some in answers.values())
    kept = sum(len(some) for some in candidates.values())
    single = sum(len({r.response_ids for r in some if len(r.response_ids) > 1}) for some in answers.values()) - kept
    assert kept + single + counts["answers_empty"] + counts["answers_repeated"] == given_
    assert len({pair.chosen.prompt_id for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.chosen.prompt_id == pair.rejected.prompt_id and pair.scores is not None
        assert pair.chosen.response_ids != pair.rejected.response_ids
        assert pair.scores[0] - pair.scores[1] > margin
        known = [scores[response.id] for response in candidates[pair.chosen.prompt_id]]
        assert pair.scores == (max(known), min(known))  # type: ignore[type-var]
        assert {pair.chosen, pair.rejected} <= set(answers[pair.chosen.prompt_id])
        assert all(len(response.response_ids) > 1 for response in (pair.chosen, pair.rejected))


def test_pairs_are_read_as_they_were_written(tmp_path: Path) -> None:
    answers = {"p": [answer("p", 1, (3, EOS)), answer("p", 2, (4, 4), "length")]}
    pairs, _ = best_and_worst(answers, {answers["p"][0].id: -0.1, answers["p"][1].id: -1 / 3})
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    text = (tmp_path / "pairs.jsonl").read_text("utf-8")
    for wrong in (text + "{}\n", text + text.replace(pairs[0].chosen.id, "0" * 16), text + "[" * 9):
        (tmp_path / "pairs.jsonl").write_text(wrong, "utf-8")
        with pytest.raises(LimbeckError, match=r"pairs\.jsonl:2 is damaged .* delete"):
            read_pairs(tmp_path / "pairs.jsonl")


class Given:
    """Materials of answers and scores that are given."""

    def __init__(self, answers: Answers, scores: Mapping[str, float | None]):
        self.answers, self.known, self.asked = answers, scores, Counter[str]()

    def sampled(self, how: SampledPairs) -> Answers:
        return self.answers

    def teacher_logp(self, answers: Answers) -> Mapping[str, float]:
        self.asked.update(response.id for given in answers.values() for response in given)
        return {name: score for name, score in self.known.items() if score is not None}

    def judged(self, judge: JudgePairs, answers: Answers) -> Mapping[str, float | None]:
        return self.known

    def of_data(self, data: DataPairs) -> PairSet:
        raise AssertionError

    def name_of(self, prompt_id: str) -> str:
        return f"{prompt_id} (data.jsonl, line 7: 'Why?')"


def test_the_teacher_is_asked_only_of_what_can_be_ranked() -> None:
    answers = {
        "p": [answer("p", 1, (3, EOS)), answer("p", 2, (4, EOS)), answer("p", 3, (EOS,)), answer("p", 4, (3, EOS))],
        "q": [answer("q", 1, (3, EOS)), answer("q", 2, (3, EOS))],
    }
    scores = {response.id: float(-response.round) for some in answers.values() for response in some}
    materials = Given(answers, scores)
    found = TeacherPairs().build(materials)
    assert set(materials.asked) == {answers["p"][0].id, answers["p"][1].id}
    assert [(pair.chosen.round, pair.rejected.round) for pair in found.pairs] == [(1, 2)]
    assert (found.prompts, found.answers) == (2, 6)
    assert {name: count for name, count in found.left_out.items() if count} == {
        "answers_empty": 1,
        "answers_repeated": 2,
        "prompts_one_answer": 1,
    }
    assert in_words(found.left_out) == (
        "1 answers that are nothing but their end, 2 answers that repeat another one of their prompt, "
        "1 prompts without two different answers"
    )


def test_nothing_but_ties_is_refused_with_the_row_and_the_remedy() -> None:
    answers = {"p": [answer("p", 1, (3, EOS)), answer("p", 2, (4, EOS))]}
    scores: dict[str, float | None] = {response.id: -1.0 for response in answers["p"]}
    with pytest.raises(LimbeckError, match=r"data\.jsonl, line 7.*1 prompts whose answers are all ties.*samples"):
        TeacherPairs().build(Given(answers, scores))
    with pytest.raises(LimbeckError, match=r"; lower preference\.pairs\.margin, raise preference\.pairs\.samples"):
        TeacherPairs(margin=1e6).build(Given(answers, dict(zip(scores, (-1.0, -2.0), strict=True))))
    same = {"p": [replace(answers["p"][0], round=n) for n in (1, 2)]}
    with pytest.raises(LimbeckError, match=r"line 7.*without two different answers"):
        TeacherPairs().build(Given(same, {}))
    with pytest.raises(LimbeckError, match=r"line 7.*verdict could not be read"):
        JudgePairs(base_url="http://localhost:1/v1").build(Given(answers, dict.fromkeys(scores)))


def test_every_kind_says_what_it_is() -> None:
    assert all(len(PAIRS.summary(name)) > 20 for name in PAIRS)
    assert [name for name in PAIRS if PAIRS[name].needs_teacher] == ["teacher"]
