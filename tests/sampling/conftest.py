"""Fixtures of the samplers' tests."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: ids 0 to 25 are letters, 26 and 27 the bytes of é, 28 a space, 29 "</s>", others three letters."""
    pieces = [chr(ord("a") + i) for i in range(26)] + ["Ã", "©", "Ġ", "</s>"]
    pieces += [f"{first}{first}{second}" for first in "abcdefgh" for second in "abcd"][: 61 - len(pieces)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
