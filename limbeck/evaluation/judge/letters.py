"""Verdicts by probability: how likely a judge finds each of the letters A and B as the first token of its reply.

A small model that never ends its reasons with a verdict still leans to one of two letters, and how far it leans is more
than a verdict says. The probabilities of all tokens that are a letter, with or without white space, are added up; what
the judge gives to other tokens is left out, and a reply whose letters hold next to nothing is unread.
"""

from __future__ import annotations

import math
from typing import Any

from limbeck.client.replies import short_json
from limbeck.evaluation.judge.opinions import LETTERS, Opinion, chat_choice, refused
from limbeck.types import Json

# A judge that gives both letters together less than this was not answering the question.
LEAST_MASS = 0.01
# White space, and the marks that stand for it where a server shows the tokenizer's own pieces.
_PADDING = " \t\r\n▁Ġ"


def read_letters(reply: Json) -> Opinion:
    """The probabilities of the letters in a chat completion of one token, and the likelier one as verdict.

    Equal ones are a tie.

    Raises:
        LimbeckError: the reply is no chat completion.
    """
    choice, said = chat_choice(reply)
    if (opinion := refused(choice, said)) is not None:
        return opinion
    likeliest = _likeliest(choice)
    if likeliest is None:
        return Opinion(text=said or short_json(reply), unread="bare")
    found = {
        letter: min(math.fsum(p for token, p in likeliest if token.strip(_PADDING) == letter), 1.0)
        for letter in LETTERS
    }
    if sum(found.values()) < LEAST_MASS:
        return Opinion(text=said, unread="faint", probabilities=found)
    verdict = "C" if found["A"] == found["B"] else "A" if found["A"] > found["B"] else "B"
    return Opinion(text=said, verdict=verdict, probabilities=found)


def _likeliest(choice: Json) -> list[tuple[str, float]] | None:
    """The likeliest first tokens with their probabilities; None where the server gives none."""
    logprobs: Any = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    given = first.get("top_logprobs") if isinstance(first, dict) else None
    entries = [(one.get("token"), one.get("logprob")) for one in given or () if isinstance(one, dict)]
    # Of a token without any probability some servers say -9999, others -Infinity; a NaN is no number.
    found = [
        (token, math.exp(max(min(logprob, 0.0), -1e4)))
        for token, logprob in entries
        if isinstance(token, str) and isinstance(logprob, int | float) and logprob == logprob
    ]
    return found or None
