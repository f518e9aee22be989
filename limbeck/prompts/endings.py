"""The token that ends an answer, and what templates write behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from limbeck.flow import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


def first_run(ids: Ids, control: Mapping[int, str]) -> Ids:
    """The first unbroken run of control tokens: Cohere ends a response and then its turn, Phi-3 the turn alone."""
    start = next((index for index, token in enumerate(ids) if token in control), len(ids))
    stop = start
    while stop < len(ids) and ids[stop] in control:
        stop += 1
    return ids[start:stop]


def cut_after_end(
    name: str, answer: Ids, ending: Ids, control: Mapping[int, str], tokenizer: PreTrainedTokenizerBase
) -> Ids:
    """The answer up to and including the token that ends the turn.

    What a template writes behind it (a line break, Phi-3's end of the whole text) no model is asked to write.

    Args:
        answer: ids that the template appends to those of the prompt.
        ending: ids of the text behind the completion alone. Control tokens are never merged with their neighbours, so
            the last ones of `answer` are those of `ending`, even if the completion spells some itself.

    Raises:
        LimbeckError: the template ends the answer with no control token.
    """
    length = sum(token in control for token in ending)
    if not length:
        raise LimbeckError(
            f"prompt {name}: the chat template of {tokenizer.name_or_path} ends an answer with no special token, "
            "so the student could not learn to stop; use template alpaca or plain, or add an end token to the template"
        )
    start = [index for index, token in enumerate(answer) if token in control][-length]
    return answer[: start + len(first_run(answer[start:], control))]
