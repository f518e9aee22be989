"""Verdicts of a judge on two answers in both orders, and the score of a pair.

Each pair is shown twice, with the student's answer first and second, since judges lean towards a place. The rule is the
conservative one of Zheng et al. (2023, section 3.4): a win counts where both orders agree on it; two ties, and orders
that disagree, count half. The win rate is the mean over pairs, and 0.5 is par.

A pair with an unread reply is left out of the rates and counted.

Where a judge is read by the probabilities of its letters (`limbeck.evaluation.judge.letters`), a pair counts the mean
over both orders of the probability that the student's answer is better, and the likelier letter is the verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.evaluation.judge.opinions import UNREAD, Opinion, Verdict
from limbeck.fields import VerdictBy
from limbeck.types import Json, LimbeckError, ScoredRow

_STUDENT_FIRST: dict[Verdict, float] = {"A": 1.0, "B": 0.0, "C": 0.5}
_STUDENT_SECOND: dict[Verdict, float] = {"A": 0.0, "B": 1.0, "C": 0.5}
# What a judge that was not understood should have said, and what may help.
_EXPECTED: dict[VerdictBy, tuple[str, str]] = {
    "text": (
        "one of [[A]], [[B]], [[C]]",
        "raise evaluate.groups.judge.max_new_tokens, or set evaluate.groups.judge.verdict=logprobs",
    ),
    "logprobs": ("A or B as its first token", "set evaluate.groups.judge.verdict=text"),
}
_EXAMPLES = 2
_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPair:
    """Two answers to a prompt and the opinions on them.

    Attributes:
        first: with the student's answer as A.
        second: with the student's answer as B.
        lengths: characters of the student's answer and of the other one.
    """

    id: str
    first: Opinion
    second: Opinion
    lengths: tuple[int, int]

    @property
    def for_student(self) -> tuple[float, float] | None:
        """1, 1/2 or 0 for the student in each order; None where one of them is unread."""
        if self.first.verdict is None or self.second.verdict is None:
            return None
        return _STUDENT_FIRST[self.first.verdict], _STUDENT_SECOND[self.second.verdict]

    @property
    def value(self) -> float | None:
        """Value of the pair: 1 or 0 where both orders say so, else 1/2; None where one of them is unread.

        By probabilities: the mean over both orders of the student's answer being the better one.
        """
        orders, first, second = self.for_student, self.first.leaning, self.second.leaning
        if orders is None:
            return None
        if first is not None and second is not None:
            return (first + (1.0 - second)) / 2
        return orders[0] if orders[0] == orders[1] else 0.5

    @property
    def leans(self) -> float | None:
        """1 or 0 where the mean probability of both orders is above or below one half, else 1/2; None as text."""
        if self.value is None or self.first.leaning is None:
            return None
        return 0.5 if self.value == 0.5 else float(self.value > 0.5)


def score_pairs(pairs: Sequence[JudgedPair], metric: str, verdict: VerdictBy = "text") -> list[ScoredRow]:
    """One row for each pair whose orders were both read.

    Args:
        metric: what the win rate is called.
        verdict: how the judge was read.

    Raises:
        LimbeckError: none was, with what was heard instead.
    """
    rows = []
    for pair in pairs:
        orders, value = pair.for_student, pair.value
        if orders is not None and value is not None:
            values = {
                metric: value,
                "judge_ties": float(value == 0.5),
                "judge_consistency": float(orders[0] == orders[1]),
            }
            if pair.leans is not None:
                values["judge_leans"] = pair.leans
            rows.append(ScoredRow(id=pair.id, weight=1.0, values=values))
    if not rows:
        opinions = [opinion for pair in pairs for opinion in (pair.first, pair.second) if opinion.unread]
        heard = " ".join(opinions[0].text.split()) or "nothing" if opinions else "nothing"
        expected, remedy = _EXPECTED[verdict]
        raise LimbeckError(
            f"the judge gave a verdict in both orders for none of {len(pairs)} pairs ({_listed(pairs)}); heard "
            f"{heard[:120]!r}, expected {expected}: name another judge with evaluate.groups.judge.model, or {remedy}"
        )
    return rows


def unread_warning(pairs: Sequence[JudgedPair], share: float = 0.2) -> str | None:
    """The warning where more than a share of the pairs is left out."""
    out = sum(pair.value is None for pair in pairs)
    if out <= share * len(pairs):
        return None
    return (
        f"the judge's verdict could not be read in both orders for {out} of {len(pairs)} pairs ({_listed(pairs)}), "
        "which are left out; the others may not stand for them"
    )


def summarise_pairs(pairs: Sequence[JudgedPair]) -> Json:
    """Counts, the leanings of the judge, and what was unread with examples of it."""
    read = [pair for pair in pairs if pair.value is not None]
    orders = [pair.for_student for pair in read if pair.for_student is not None]
    verdicts = Counter(str(opinion.verdict) for pair in read for opinion in (pair.first, pair.second))
    return {
        "pairs": len(pairs),
        "counted": len(read),
        "wins": orders.count((1.0, 1.0)),
        "losses": orders.count((0.0, 0.0)),
        "ties_in_both_orders": orders.count((0.5, 0.5)),
        "orders_disagree": sum(a != b for a, b in orders),
        # The rule of DistiLLM-2 and others, for comparison: each order counts on its own.
        "win_rate_by_mean_of_orders": sum(a + b for a, b in orders) / (2 * len(orders)) if orders else None,
        "place": {"first": verdicts["A"], "second": verdicts["B"], "tie": verdicts["C"]},
        "length": _lengths(read),
        "unread": _unread(pairs),
    } | _letters(read)


def _letters(read: Sequence[JudgedPair]) -> Json:
    """Of a judge that was read by probabilities: that of A, which is 1/2 where places do not sway it, and of both."""
    opinions = [opinion for pair in read for opinion in (pair.first, pair.second)]
    leanings = [leaning for opinion in opinions if (leaning := opinion.leaning) is not None]
    if not leanings:
        return {}
    masses = [mass for opinion in opinions if (mass := opinion.mass) is not None]
    return {"letters": {"first_place": sum(leanings) / len(leanings), "mass": sum(masses) / len(masses)}}


def _lengths(read: Sequence[JudgedPair]) -> Json:
    """Share of wins of the longer answer, among the pairs with a winner and answers of different lengths."""
    uneven = [pair for pair in read if pair.value != 0.5 and pair.lengths[0] != pair.lengths[1]]
    longer = sum(((pair.value or 0.0) > 0.5) == (pair.lengths[0] > pair.lengths[1]) for pair in uneven)
    return {
        "longer_answer_wins": longer / len(uneven) if uneven else None,
        "of": len(uneven),
        "mean_characters": {
            "student": sum(pair.lengths[0] for pair in read) / len(read) if read else None,
            "other": sum(pair.lengths[1] for pair in read) / len(read) if read else None,
        },
    }


def _unread(pairs: Sequence[JudgedPair]) -> Json:
    """Replies by the reason they were not read."""
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        for order, opinion in (("student first", pair.first), ("student second", pair.second)):
            if opinion.unread is None:
                continue
            kind = found.setdefault(opinion.unread, {"replies": 0, "meaning": UNREAD[opinion.unread], "examples": []})
            kind["replies"] += 1
            if len(kind["examples"]) < _EXAMPLES:
                # Its end: that is where a verdict should be.
                kind["examples"].append({"id": pair.id, "order": order, "text": opinion.text[-_SHOWN:]})
    return found


def _listed(pairs: Sequence[JudgedPair]) -> str:
    kinds = Counter(o.unread for pair in pairs for o in (pair.first, pair.second) if o.unread)
    return ", ".join(f"{count} replies: {UNREAD[kind]}" for kind, count in kinds.most_common())
