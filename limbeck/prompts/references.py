"""Checks for reference answers where they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from limbeck.prompts.labels import prompt_label
from limbeck.types import LimbeckError, Prompt


def require_references(prompts: Sequence[Prompt], remedy: str) -> dict[str, tuple[str, ...]]:
    """The reference answers of every prompt by its id.

    Args:
        remedy: what to change where there are none, naming the recipe key.

    Raises:
        LimbeckError: a prompt has none; names it and its place in the data.
    """
    found = {prompt.id: prompt.known_answers for prompt in prompts}
    without = [prompt for prompt in prompts if not prompt.known_answers]
    if without:
        raise LimbeckError(
            f"prompt {prompt_label(without[0])} has no reference answer, one of {len(without)} among {len(prompts)} "
            f"held-out prompts; expected one or more for each: {remedy}"
        )
    return found


def require_answers_for_sft(prompts: Iterable[Prompt]) -> None:
    """Check that every prompt of a first stage on the data's answers has one, before the teacher samples anything.

    Raises:
        LimbeckError: a training prompt has none; names it and its place in the data.
    """
    first, without, count = None, 0, 0
    for prompt in prompts:
        count += 1
        if not prompt.answered:
            first, without = first or prompt, without + 1
    if first is not None:
        raise LimbeckError(
            f"prompt {prompt_label(first)} has no answer, one of {without} among {count} "
            "training prompts, but sft.source=data teaches from the data's answers; give data with answers, "
            "or set sft.source=responses"
        )
