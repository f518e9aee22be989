"""The token that ends an answer, and the text that templates write after it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from limbeck.types import LimbeckError


@lru_cache(maxsize=8)
def _runs(spellings: frozenset[str]) -> re.Pattern[str]:
    """Unbroken runs of control tokens, longer spellings first."""
    return re.compile(
        "(?:" + "|".join(re.escape(token) for token in sorted(spellings, key=lambda t: (-len(t), t))) + ")+"
    )


def _pattern(control: Mapping[int, str]) -> re.Pattern[str] | None:
    spellings = frozenset(token for token in control.values() if token)
    return _runs(spellings) if spellings else None


def end_of_text(where: str, ending: str, control: Mapping[int, str]) -> int:
    """Number of characters after an answer up to and including the token that ends the turn.

    That is the first unbroken run of control tokens: Cohere ends a response and then its turn, Phi-3 the turn alone.
    What a template writes behind it (a line break, Phi-3's end of the whole text) no model is asked to write.

    Raises:
        LimbeckError: the template ends the answer with no control token.
    """
    pattern = _pattern(control)
    found = pattern.search(ending) if pattern else None
    if found is None:
        raise LimbeckError(
            f"{where} ends an answer with no special token, "
            "so the student could not learn to stop; use template alpaca or plain, or add an end token to the template"
        )
    return found.end()


def last_run(text: str, control: Mapping[int, str]) -> str:
    """The text from the last unbroken run of control tokens on; empty where there is none."""
    pattern = _pattern(control)
    found = list(pattern.finditer(text)) if pattern else []
    return text[found[-1].start() :] if found else ""


def end_token(ending: str, control: Mapping[int, str]) -> int | None:
    """Id of the token that ends the turn, found in the text after an answer; None where there is none."""
    pattern = _pattern(control)
    found = pattern.search(ending) if pattern else None
    if found is None:
        return None
    return next(
        index
        for index, token in sorted(control.items(), key=lambda c: -len(c[1]))
        if token and found.group().endswith(token)
    )
