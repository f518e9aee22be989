"""A string of bytes in the tokens of a tokenizer, each token with the bytes that it covers.

The bytes need not be a text: an answer that was cut off may end inside a character. What is no UTF-8 is spelled byte by
byte; the rest is tokenised as the text that it is, in which nothing is read as a control token. Where the tokenizer
changes a text first (Qwen composes accents), its tokens hold other bytes than the text: there the characters that a run
of tokens stands for are covered by the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.teachers.alignment.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """Tokens of a string of bytes.

    Attributes:
        ids: token ids.
        ends: where each token ends, in bytes; it begins where the one before it ends. Ascending, the last is `size`.
            A token may cover none.
        size: number of bytes.
    """

    ids: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    size: int = 0

    def then(self, other: Spelling) -> Spelling:
        """This one and another behind it."""
        ends, size = (*self.ends, *(self.size + end for end in other.ends)), self.size + other.size
        # A text of which the tokenizer leaves nothing belongs to the token before it.
        return Spelling(ids=(*self.ids, *other.ids), ends=(*ends[:-1], size) if ends else (), size=size)


@dataclass(frozen=True, kw_only=True)
class Speller:
    """Spells strings of bytes in the tokens of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    token_bytes: TokenBytes

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Speller:
        return cls(tokenizer=tokenizer, token_bytes=TokenBytes.read(tokenizer))

    def spell(self, data: bytes) -> Spelling:
        """The tokens of some bytes."""
        whole = Spelling()
        for part in _parts(data):
            whole = whole.then(self._text(part) if isinstance(part, str) else self._bytes(part))
        return whole

    def _text(self, text: str) -> Spelling:
        encoded: Any = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids, offsets, data = encoded["input_ids"], encoded["offset_mapping"], text.encode()
        ends = exact_ends(data, [self.token_bytes.of[index] for index in ids])
        ends = ends or self._mended_ends(text, ids, offsets)
        return Spelling(ids=tuple(ids), ends=ends, size=len(data))

    def _bytes(self, data: bytes) -> Spelling:
        """Bytes that are no text, one token each; the tokens of the replacement character for one without a token
        (SmolLM2 has none for the bytes that no UTF-8 contains)."""
        whole, single = Spelling(), self.token_bytes.single
        for byte in data:
            ids = (single[byte],) if byte in single else self._text("\ufffd").ids
            whole = whole.then(Spelling(ids=ids, ends=(1,) * len(ids), size=1))
        return whole

    def _mended_ends(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """The ends of tokens whose bytes are not those of the text, by the characters that the tokenizer says."""
        ends: list[int] = []
        done = place = 0
        runs = list(_runs(offsets))
        for number, (first, last, stop) in enumerate(runs):
            if number == len(runs) - 1:
                stop = len(text)
            data = text[done:stop].encode()
            found = exact_ends(data, [self.token_bytes.of[index] for index in ids[first:last]])
            ends += [place + end for end in found or [len(data)] * (last - first)]
            done, place = stop, place + len(data)
        return tuple(ends)


def exact_ends(data: bytes, tokens: Sequence[bytes]) -> tuple[int, ...]:
    """Where each token ends if they are the bytes one behind another; nothing if they are not."""
    if b"".join(tokens) != data:
        return ()
    ends, end = [], 0
    for token in tokens:
        end += len(token)
        ends.append(end)
    return tuple(ends)


def _runs(offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Runs of tokens that share no character with their neighbours: (first, last + 1, end of their characters)."""
    ahead, least = [0] * len(offsets), 1 << 60
    for i in range(len(offsets) - 1, -1, -1):
        ahead[i] = least
        least = min(least, offsets[i][0])
    first = stop = 0
    for i, (_, end) in enumerate(offsets):
        stop = max(stop, end)
        if ahead[i] >= stop:
            yield first, i + 1, stop
            first = i + 1


def _parts(data: bytes) -> Iterator[str | bytes]:
    """The texts in some bytes, and what stands between them."""
    while data:
        try:
            yield data.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start].decode()
            yield data[error.start : error.end]
            data = data[error.end :]
