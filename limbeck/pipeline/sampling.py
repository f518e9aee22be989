"""Sampling settings from a recipe."""

from __future__ import annotations

from limbeck.recipe.responses import ResponsesSection
from limbeck.types import Sampling


def sampling_of(section: ResponsesSection) -> Sampling:
    """Settings of the teacher's responses."""
    return Sampling(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        stop=section.stop,
        seed=section.seed,
    )
