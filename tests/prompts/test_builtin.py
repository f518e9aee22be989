"""The prompts that ship: many, varied, plain ASCII, none like another."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from limbeck.prompts.sources import PromptSet, load_prompts
from limbeck.types import Prompt


@pytest.fixture(scope="module")
def builtin() -> PromptSet:
    return load_prompts("builtin", heldout_fraction=0.1)


def text_of(prompt: Prompt) -> str:
    assert prompt.text is not None
    return prompt.text


def test_there_are_many_in_balanced_categories(builtin: PromptSet) -> None:
    assert len(builtin.prompts) >= 460
    assert builtin.duplicates == 0
    sizes = Counter(prompt.category for prompt in builtin.prompts)
    assert None not in sizes
    assert 8 <= len(sizes) <= 12
    assert max(sizes.values()) <= 1.5 * min(sizes.values())


def test_they_are_instructions_and_half_of_the_categories_are_held_out(builtin: PromptSet) -> None:
    assert all(prompt.instruction == (prompt.text, "") for prompt in builtin.prompts)
    heldout = builtin.of("heldout")
    assert 0.06 < len(heldout) / len(builtin.prompts) < 0.14
    assert len({prompt.category for prompt in heldout}) >= 6


def test_they_are_short_tidy_ascii(builtin: PromptSet) -> None:
    for prompt in builtin.prompts:
        text = text_of(prompt)
        assert text.isascii(), text
        assert text == text.strip(), text
        assert 3 <= len(text.split()) <= 80, text


def test_none_is_like_another(builtin: PromptSet) -> None:
    words = [(text_of(p), set(re.findall(r"[a-z0-9']+", text_of(p).lower()))) for p in builtin.prompts]
    for (one, a), (other, b) in combinations(words, 2):
        assert len(a & b) <= 0.6 * len(a | b), f"{one!r} is like {other!r}"
