"""The bytes that each token of a tokenizer stands for, read from its rules and never from decoded text.

Decoding loses what is needed here: a token that holds half a character decodes to the replacement character. Byte-level
tokenizers (GPT-2, Llama 3, Qwen, SmolLM2) write each byte as a printable character; sentencepiece ones (Llama 2, Gemma)
write a space as "▁" and a byte without a piece of its own as "<0x0A>".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from limbeck.models.fingerprints import backend_rules
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """The bytes of every token of a tokenizer.

    Attributes:
        of: bytes by id; of a control token those of its spelling.
        control: spelling of the control tokens by id: no text is meant to hold them.
        fallback: ids that stand for a byte which has no piece of its own.
    """

    of: Mapping[int, bytes]
    control: Mapping[int, str]
    fallback: frozenset[int]

    @cached_property
    def ids(self) -> dict[bytes, tuple[int, ...]]:
        """The ordinary tokens of each sequence of bytes, the one that text becomes before one that is there for lack of
        a better."""
        found: dict[bytes, tuple[int, ...]] = {}
        for index in sorted(self.of.keys() - self.control.keys(), key=lambda i: (i in self.fallback, i)):
            found[self.of[index]] = (*found.get(self.of[index], ()), index)
        return found

    @cached_property
    def single(self) -> dict[int, int]:
        """The id of each single byte; of two, the one that stands for the byte whatever surrounds it."""
        found: dict[int, int] = {}
        for index in sorted(self.of.keys() - self.control.keys(), key=lambda i: (i not in self.fallback, i)):
            if len(self.of[index]) == 1:
                found.setdefault(self.of[index][0], index)
        return found

    @classmethod
    def read(cls, tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
        """The bytes of a tokenizer's tokens.

        Raises:
            LimbeckError: it is neither byte-level nor sentencepiece.
        """
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        control = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        control |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        kind = _kind(tokenizer)
        of, fallback = {}, set()
        for piece, index in tokenizer.get_vocab().items():
            if index in added or index in control:
                of[index] = added.get(index, piece).encode()
            elif kind == "byte-level":
                of[index] = _from_byte_level(piece)
            elif byte := _BYTE_PIECE.fullmatch(piece):
                of[index] = bytes([int(byte[1], 16)])
                fallback.add(index)
            else:
                of[index] = piece.replace("▁", " ").encode()
        return cls(of=of, control=control, fallback=frozenset(fallback))


def _kind(tokenizer: PreTrainedTokenizerBase) -> str:
    """Whether a tokenizer is byte-level or sentencepiece.

    Raises:
        LimbeckError: it is neither.
    """
    if tokenizer.is_fast:
        decoders = list(_steps(backend_rules(tokenizer).get("decoder")))
        kinds = {step.get("type") for step in decoders}
        if "ByteLevel" in kinds:
            return "byte-level"
        spaces = any(step.get("pattern") == {"String": "▁"} for step in decoders)
        if spaces or kinds & {"Metaspace", "ByteFallback"}:
            return "sentencepiece"
    raise LimbeckError(
        f"the tokenizer of {tokenizer.name_or_path} is neither byte-level nor sentencepiece, so the bytes of its "
        "tokens are not known; choose a model whose tokenizer is one of the two"
    )


def _steps(rules: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, sequences opened."""
    if rules is None:
        return
    yield rules
    for step in rules.get("decoders", ()):
        yield from _steps(step)


@cache
def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself where it is printable, and from 256 on
    the others in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _from_byte_level(piece: str) -> bytes:
    table = _byte_of_char()
    return b"".join(bytes([table[char]]) if char in table else char.encode() for char in piece)
