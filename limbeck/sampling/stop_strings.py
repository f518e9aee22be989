"""Search for stop strings in the text of a response while it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A detokeniser may treat the first piece of a text apart (strip its space, wait for the rest of a character).
SLACK = 8


@dataclass(frozen=True)
class StopStrings:
    """Looks for strings in the text of the newest tokens only, so that a step costs the same at any length.

    A string counts wherever it lies in the text, also across tokens and in special tokens; the response keeps every id
    up to and including the token that completed it, whatever else that token holds.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.strings and all(self.strings)

    @property
    def reach(self) -> int:
        """Tokens to decode: a token holds at least one byte of the text, and some slack."""
        return max(len(string.encode()) for string in self.strings) + SLACK

    def complete(self, response_ids: Sequence[int]) -> bool:
        """Whether the text of the ids holds one of the strings, the last token included.

        To be asked after every token; strings completed by earlier tokens may no longer be seen.
        """
        text = self.tokenizer.decode(
            list(response_ids[-self.reach :]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(string in text for string in self.strings)
