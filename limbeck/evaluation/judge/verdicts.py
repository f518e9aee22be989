"""Verdicts of a judge on two answers, read from its replies, and the score of a pair in both orders.

Each pair is shown twice, with the student's answer first and second, since judges lean towards a place. The rule is the
conservative one of Zheng et al. (2023, section 3.4): a win counts where both orders agree on it; two ties, and orders
that disagree, count half. The win rate is the mean over pairs, and 0.5 is par.

A reply counts where it holds exactly one distinct verdict, [[A]], [[B]] or [[C]] (a tie), in whatever prose. Every
other reply is unread, for one of the reasons in `UNREAD`; its pair is left out of the rates and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from limbeck.client.replies import short_json
from limbeck.types import Json, LimbeckError, ScoredRow, is_unicode

Verdict = Literal["A", "B", "C"]
Unread = Literal["none", "contradictory", "truncated", "empty", "refused", "garbled", "odd"]

UNREAD: dict[str, str] = {
    "none": "no verdict in it",
    "contradictory": "more than one verdict",
    "truncated": "cut off at evaluate.groups.judge.max_new_tokens",
    "empty": "nothing said",
    "refused": "refused to judge",
    "garbled": "half of a surrogate pair in it, which is no text",
    "odd": "no chat completion",
}
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_THOUGHT_ENDS = "</think>"
_STUDENT_FIRST: dict[Verdict, float] = {"A": 1.0, "B": 0.0, "C": 0.5}
_STUDENT_SECOND: dict[Verdict, float] = {"A": 0.0, "B": 1.0, "C": 0.5}
_EXAMPLES = 2
_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """A parsed reply. Exactly one of `verdict` and `unread` is set."""

    text: str
    verdict: Verdict | None = None
    unread: Unread | None = None

    def __post_init__(self) -> None:
        if (self.verdict in _STUDENT_FIRST) == (self.unread in UNREAD):
            raise ValueError(f"verdict {self.verdict!r} and unread {self.unread!r}, expected one of them")


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
        """Value of the pair: 1 or 0 where both orders say so, else 1/2; None where one of them is unread."""
        orders = self.for_student
        return None if orders is None else orders[0] if orders[0] == orders[1] else 0.5


def read_opinion(reply: Json) -> Opinion:
    """The text of a chat completion, without anything before a closing </think>.

    Raises:
        LimbeckError: the reply is no chat completion.
    """
    return without_garbled(_read(reply))


def without_garbled(opinion: Opinion) -> Opinion:
    """An opinion whose verdict does not count where its text is none."""
    if is_unicode(opinion.text) or opinion.unread in ("refused", "truncated", "odd"):
        return opinion
    return Opinion(text=opinion.text, unread="garbled")


def printable_judgement(opinion: Opinion) -> Opinion:
    """An opinion as files of UTF-8 can hold it: halves of surrogate pairs are spelled out."""
    return replace(opinion, text=opinion.text.encode("utf-8", "backslashreplace").decode("utf-8"))


def no_completion(shown: str) -> LimbeckError:
    """The error for a reply that is no chat completion."""
    return LimbeckError(
        f"the judge answers {shown}, expected a chat completion; check that evaluate.groups.judge.base_url is that of "
        "an OpenAI-compatible server"
    )


def _read(reply: Json) -> Opinion:
    choices = reply.get("choices")
    choice: Any = choices[0] if isinstance(choices, list) and choices else None
    message: Any = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else 0
    if not (content is None or isinstance(content, str)):
        raise no_completion(short_json(reply))
    said, finish = content or "", choice.get("finish_reason")
    if finish == "content_filter" or message.get("refusal"):
        return Opinion(text=str(message.get("refusal") or said), unread="refused")
    if finish == "length":
        return Opinion(text=said, unread="truncated")
    spoken = said.rpartition(_THOUGHT_ENDS)[2]
    if not spoken.strip():
        return Opinion(text=said, unread="empty")
    found: set[Any] = set(_VERDICT.findall(spoken))
    if len(found) != 1:
        return Opinion(text=said, unread="contradictory" if found else "none")
    return Opinion(text=said, verdict=found.pop())


def score_pairs(pairs: Sequence[JudgedPair], metric: str) -> list[ScoredRow]:
    """One row for each pair whose orders were both read.

    Args:
        metric: what the win rate is called.

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
            rows.append(ScoredRow(id=pair.id, weight=1.0, values=values))
    if not rows:
        opinions = [opinion for pair in pairs for opinion in (pair.first, pair.second) if opinion.unread]
        heard = " ".join(opinions[0].text.split()) or "nothing" if opinions else "nothing"
        raise LimbeckError(
            f"the judge gave a verdict in both orders for none of {len(pairs)} pairs ({_listed(pairs)}); heard "
            f"{heard[:120]!r}, expected one of [[A]], [[B]], [[C]]: name another judge with "
            "evaluate.groups.judge.model, or raise evaluate.groups.judge.max_new_tokens"
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
        "wins": sum(pair.value == 1.0 for pair in read),
        "losses": sum(pair.value == 0.0 for pair in read),
        "ties_in_both_orders": sum(order == (0.5, 0.5) for order in orders),
        "orders_disagree": sum(a != b for a, b in orders),
        # The rule of DistiLLM-2 and others, for comparison: each order counts on its own.
        "win_rate_by_mean_of_orders": sum(a + b for a, b in orders) / (2 * len(orders)) if orders else None,
        "place": {"first": verdicts["A"], "second": verdicts["B"], "tie": verdicts["C"]},
        "length": _lengths(read),
        "unread": _unread(pairs),
    }


def _lengths(read: Sequence[JudgedPair]) -> Json:
    """Share of wins of the longer answer, among the pairs with a winner and answers of different lengths."""
    uneven = [pair for pair in read if pair.value != 0.5 and pair.lengths[0] != pair.lengths[1]]
    longer = sum((pair.value == 1.0) == (pair.lengths[0] > pair.lengths[1]) for pair in uneven)
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
