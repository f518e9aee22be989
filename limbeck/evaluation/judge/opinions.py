"""A judge's opinion of two answers, read from its reply.

A reply counts where it holds exactly one distinct verdict, [[A]], [[B]] or [[C]] (a tie), in whatever prose. Every
other reply is unread, for one of the reasons in `UNREAD`. Replies that are read by the probabilities of a letter are in
`limbeck.evaluation.judge.letters`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from limbeck.client.replies import short_json
from limbeck.types import Json, LimbeckError, is_unicode

Verdict = Literal["A", "B", "C"]
VERDICTS: tuple[Verdict, ...] = ("A", "B", "C")
Unread = Literal["none", "contradictory", "truncated", "empty", "refused", "garbled", "odd", "faint", "bare"]

UNREAD: dict[str, str] = {
    "none": "no verdict in it",
    "contradictory": "more than one verdict",
    "truncated": "cut off at evaluate.groups.judge.max_new_tokens",
    "empty": "nothing said",
    "refused": "refused to judge",
    "garbled": "half of a surrogate pair in it, which is no text",
    "odd": "no chat completion",
    "faint": "next to no probability of A or B",
    "bare": "no log-probabilities with it",
}
# Replies that say nothing of the question, which is asked again.
NO_USE = ("odd", "bare")
# What a judge that is read by probabilities chooses from.
LETTERS: tuple[Verdict, ...] = ("A", "B")
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_THOUGHT_ENDS = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """A parsed reply. Exactly one of `verdict` and `unread` is set.

    Attributes:
        probabilities: of each letter among all first tokens, where the judge was read by them.
    """

    text: str
    verdict: Verdict | None = None
    unread: Unread | None = None
    probabilities: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if (self.verdict in VERDICTS) == (self.unread in UNREAD):
            raise ValueError(f"verdict {self.verdict!r} and unread {self.unread!r}, expected one of them")
        if self.probabilities is not None and not _are_of_letters(self.probabilities):
            raise ValueError(f"probabilities {self.probabilities!r}, expected those of A and B")

    @property
    def mass(self) -> float | None:
        """Probability of both letters together."""
        return None if self.probabilities is None else sum(self.probabilities.values())

    @property
    def leaning(self) -> float | None:
        """Probability of A where it is either letter; None where there is no verdict or it was read as text."""
        mass = self.mass
        return self.probabilities["A"] / mass if self.verdict and self.probabilities and mass else None


def _are_of_letters(probabilities: Any) -> bool:
    """Whether a value, perhaps from a damaged file, gives each letter a probability."""
    if not isinstance(probabilities, dict) or probabilities.keys() != set(LETTERS):
        return False
    return all(isinstance(p, float) and 0.0 <= p <= 1.0 + 1e-3 for p in probabilities.values())


def read_opinion(reply: Json) -> Opinion:
    """The text of a chat completion, without anything before a closing </think>.

    Raises:
        LimbeckError: the reply is no chat completion.
    """
    return without_garbled(_read(reply))


def without_garbled(opinion: Opinion) -> Opinion:
    """An opinion whose verdict does not count where its text is none."""
    # A letter's probability is read off its own text, whatever was said.
    if is_unicode(opinion.text) or opinion.unread in ("refused", "truncated", *NO_USE) or opinion.probabilities:
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


def chat_choice(reply: Json) -> tuple[Json, str]:
    """The first choice of a chat completion, and its text.

    Raises:
        LimbeckError: the reply is no chat completion.
    """
    choices = reply.get("choices")
    choice: Any = choices[0] if isinstance(choices, list) and choices else None
    message: Any = choice.get("message") if isinstance(choice, dict) else None
    content = message.get("content") if isinstance(message, dict) else 0
    if not (content is None or isinstance(content, str)):
        raise no_completion(short_json(reply))
    return choice, content or ""


def refused(choice: Json, said: str) -> Opinion | None:
    """The opinion of a choice that refuses to judge; None of any other."""
    refusal = choice["message"].get("refusal")
    if choice.get("finish_reason") != "content_filter" and not refusal:
        return None
    return Opinion(text=str(refusal or said), unread="refused")


def _read(reply: Json) -> Opinion:
    choice, said = chat_choice(reply)
    if (opinion := refused(choice, said)) is not None:
        return opinion
    if choice.get("finish_reason") == "length":
        return Opinion(text=said, unread="truncated")
    spoken = said.rpartition(_THOUGHT_ENDS)[2]
    if not spoken.strip():
        return Opinion(text=said, unread="empty")
    found: set[Any] = set(_VERDICT.findall(spoken))
    if len(found) != 1:
        return Opinion(text=said, unread="contradictory" if found else "none")
    return Opinion(text=said, verdict=found.pop())
