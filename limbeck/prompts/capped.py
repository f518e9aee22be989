"""A cap on held-out prompts, which cost a pass of both models and, often, their states on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from limbeck.prompts.sources import PromptSet, canonical_content, split_number
from limbeck.types import Prompt, Split


def at_most_heldout(
    loaded: PromptSet, most: int, *, split_seed: int, others: Literal["train", "left_out"]
) -> PromptSet:
    """The prompts with so many held out at most: those that the smallest share would hold out.

    A smaller cap keeps a part of what a larger one does, as with a smaller share.

    Args:
        others: what becomes of the rest: trained on, as with a smaller share, or left out, where held-out prompts come
            from a source of their own.
    """

    def number(prompt: Prompt) -> tuple[int, str]:
        return split_number(canonical_content(prompt), split_seed), prompt.id

    heldout = sorted(loaded.of("heldout"), key=number)
    surplus = {prompt.id for prompt in heldout[most:]}
    if others == "left_out":
        kept = tuple(prompt for prompt in loaded.prompts if prompt.id not in surplus)
        return replace(loaded, prompts=kept, limited=loaded.limited + len(surplus))

    def split(prompt: Prompt) -> Split:
        return "train" if prompt.id in surplus else prompt.split

    return replace(loaded, prompts=tuple(replace(prompt, split=split(prompt)) for prompt in loaded.prompts))
