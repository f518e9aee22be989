"""What a reply says, and what two of them make of a pair."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluation.judge.opinions import VERDICTS, Opinion, Verdict, read_opinion
from limbeck.evaluation.judge.verdicts import JudgedPair, score_pairs, summarise_pairs, unread_warning
from limbeck.evaluation.scores.metrics import METRICS
from limbeck.types import LimbeckError


def reply(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": finish, "message": {"content": text, **message}}]}


def pair(first: Verdict | None, second: Verdict | None, name: str = "p", lengths: tuple[int, int] = (3, 5)):
    one, two = (
        Opinion(text=f"[[{v}]]", verdict=v) if v else Opinion(text="Who knows?", unread="none") for v in (first, second)
    )
    return JudgedPair(id=name, first=one, second=two, lengths=lengths)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"),
        ("Both are fine, B is clearer.\n\n**[[B]]**.", "B"),
        ("I lean to [[C]] for this. Final verdict: [[ C ]]", "C"),
        ("<think>[[A]] or [[B]]? Surely [[A]].</think>\nShort and right.\n[[B]]", "B"),
        ("不错 [[A]] 。", "A"),
    ],
)
def test_a_verdict_in_any_prose(text: str, verdict: str) -> None:
    assert read_opinion(reply(text)) == Opinion(text=text, verdict=verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (reply("A is better."), "none"),
        (reply("[A]"), "none"),
        (reply("[[a]] [[Tie]] [[A>B]] [[D]]"), "none"),
        (reply("[[A]], [[B]] or [[C]]?"), "contradictory"),
        (reply("[[A]] is what I would say, though [[B]] is not bad."), "contradictory"),
        (reply("The verdict is [[A]] since", "length"), "truncated"),
        (reply(None, "length"), "truncated"),
        (reply("  \n"), "empty"),
        (reply(None), "empty"),
        (reply("<think>[[A]]</think> "), "empty"),
        (reply(None, refusal="I cannot judge this."), "refused"),
        (reply("", "content_filter"), "refused"),
    ],
    ids=str,
)
def test_everything_else_is_unread_and_never_a_tie(said: dict[str, Any], why: str) -> None:
    opinion = read_opinion(said)
    assert (opinion.verdict, opinion.unread) == (None, why)


@pytest.mark.parametrize("said", [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 7}}]}])
def test_what_is_no_completion_is_an_error(said: dict[str, Any]) -> None:
    with pytest.raises(LimbeckError, match=r"expected a chat completion; check that evaluate\.groups\.judge\.base_url"):
        read_opinion(said)


def test_the_rule_over_all_pairs_of_verdicts() -> None:
    """Straight from its words: both orders for the student, both against it, or half."""
    for first, second in product(VERDICTS, VERDICTS):
        (row,) = score_pairs([pair(first, second)], "win_rate")
        expected = 1.0 if (first, second) == ("A", "B") else 0.0 if (first, second) == ("B", "A") else 0.5
        same = (first, second) in (("A", "B"), ("B", "A"), ("C", "C"))
        assert row.values == {"win_rate": expected, "judge_ties": expected == 0.5, "judge_consistency": same}
        assert row.weight == 1.0 and row.values.keys() <= METRICS.keys()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS)), min_size=1, max_size=20))
def test_the_two_sides_of_a_comparison_add_up_to_one(verdicts: list[tuple[Verdict, Verdict]]) -> None:
    """Seen from the other side, the two orders change places and nothing else."""
    pairs = [pair(first, second, str(i), (i % 3, 2)) for i, (first, second) in enumerate(verdicts)]
    mirrored = [pair(second, first, str(i), (2, i % 3)) for i, (first, second) in enumerate(verdicts)]
    ours, theirs = (score_pairs(side, "win_rate") for side in (pairs, mirrored))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.values["win_rate"] + other.values["win_rate"] == 1.0
        assert mine.values["judge_consistency"] == other.values["judge_consistency"]
    here, there = summarise_pairs(pairs), summarise_pairs(mirrored)
    assert (here["wins"], here["losses"]) == (there["losses"], there["wins"])
    assert here["length"]["longer_answer_wins"] == there["length"]["longer_answer_wins"]
    assert here["win_rate_by_mean_of_orders"] + there["win_rate_by_mean_of_orders"] == pytest.approx(1.0)
    kinds = ("wins", "losses", "ties_in_both_orders", "orders_disagree")
    assert sum(here[kind] for kind in kinds) == here["counted"] == len(verdicts)


def test_a_judge_of_places_alone_is_at_par() -> None:
    for verdict in ("A", "B"):
        rows = score_pairs([pair(verdict, verdict, str(i)) for i in range(5)], "win_rate")
        assert {row.values["win_rate"] for row in rows} == {0.5}
        assert {row.values["judge_consistency"] for row in rows} == {0.0}


def test_pairs_with_an_unread_order_are_left_out_and_counted() -> None:
    pairs = [pair("A", "B", "read"), pair("A", None, "half"), pair(None, None, "none")]
    assert [row.id for row in score_pairs(pairs, "win_rate")] == ["read"]
    found = summarise_pairs(pairs)
    assert (found["pairs"], found["counted"], found["wins"]) == (3, 1, 1)
    assert found["unread"]["none"]["replies"] == 3
    assert found["unread"]["none"]["examples"][0] == {"id": "half", "order": "student second", "text": "Who knows?"}
    said = unread_warning(pairs)
    assert said is not None and "2 of 3 pairs (3 replies: no verdict in it), which are left out" in said
    assert unread_warning([pair("A", "B")] * 4 + [pair("A", None)]) is None
    assert unread_warning([pair("A", "B")] * 3 + [pair("A", None)]) is not None


def test_nothing_read_at_all_is_an_error_with_what_was_heard() -> None:
    with pytest.raises(
        LimbeckError, match=r"none of 2 pairs \(3 replies: no verdict in it\); heard 'Who knows\?', exp"
    ):
        score_pairs([pair(None, None), pair("A", None)], "win_rate")


def test_the_leanings_of_a_judge() -> None:
    pairs = [
        pair("A", "B", "0", (9, 5)),
        pair("B", "A", "1", (2, 5)),
        pair("A", "B", "2", (2, 5)),
        pair("A", "B", "3", (5, 5)),
        pair("C", "C", "4", (9, 5)),
    ]
    found = summarise_pairs(pairs)
    assert found["length"]["longer_answer_wins"] == pytest.approx(2 / 3) and found["length"]["of"] == 3
    assert found["place"] == {"first": 4, "second": 4, "tie": 2}
    assert found["win_rate_by_mean_of_orders"] == pytest.approx(0.7)
