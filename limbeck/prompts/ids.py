"""Texts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from limbeck.types import shared_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokenizer keeps place, text and more of every token of a call until the call ends.
_TEXTS = 512


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[tuple[int, ...]]:
    """The ids of each text.

    Args:
        special: let the tokenizer add what its models expect around a text (Llama's beginning of sequence).
    """
    found: list[tuple[int, ...]] = []
    for start in range(0, len(texts), _TEXTS):
        encoded = tokenizer(
            list(texts[start : start + _TEXTS]),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        found += [shared_ids(ids) for ids in encoded["input_ids"]]  # type: ignore[union-attr]
    return found
