"""A cap on held-out prompts, which cost a pass of both models and, often, their states on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from limbeck.prompts.scratch import FiledPrompts
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

    heldout = sorted((split_number(canonical_content(p), split_seed), p.id) for p in loaded.of("heldout"))
    surplus = {name for _, name in heldout[most:]}
    if isinstance(loaded.prompts, FiledPrompts):
        if others == "left_out":
            return replace(loaded, prompts=loaded.prompts.without(surplus), limited=loaded.limited + len(surplus))
        return replace(loaded, prompts=loaded.prompts.trained_on(surplus))
    if others == "left_out":
        kept = tuple(prompt for prompt in loaded.prompts if prompt.id not in surplus)
        return replace(loaded, prompts=kept, limited=loaded.limited + len(surplus))

    def split(prompt: Prompt) -> Split:
        return "train" if prompt.id in surplus else prompt.split

    return replace(loaded, prompts=tuple(replace(prompt, split=split(prompt)) for prompt in loaded.prompts))
