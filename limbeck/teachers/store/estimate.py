"""The size of a store before anything is captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from limbeck.teachers.store.addresses import ADDRESS
from limbeck.teachers.store.base import Codec, Frame, bytes_per_token
from limbeck.teachers.store.texts import TEXT_INDEX_BYTES, id_bytes
from limbeck.teachers.store.writer import SHARD_BYTES, SHARD_RESPONSES

# Address, first row, number of rows, checksum.
INDEX_BYTES = ADDRESS + 8 + 8 + 4
# Header of a shard's file and its seal, and the manifest: they hold a few names and numbers.
SHARD_HEADER_BYTES, _MANIFEST_BYTES = 1_100, 1_300


class Length(NamedTuple):
    """Tokens of a text: those that enter the loss, and all of prompt and answer."""

    loss: int
    ids: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What some texts will take on disk.

    Attributes:
        per_token: of the signals, without index and head.
        shared: what all tokens share, such as a head.
        texts: the texts themselves, where the teacher writes them.
    """

    codec: Codec
    responses: int
    tokens: int
    per_token: int
    shards: int
    shared: int
    texts: int

    @property
    def bytes(self) -> int:
        rows = self.per_token * self.tokens + self.responses * INDEX_BYTES
        return rows + self.shards * SHARD_HEADER_BYTES + self.shared + self.texts


def estimate(
    codec: Codec,
    heldout: Codec,
    frame: Frame,
    train: Sequence[Length],
    held: Sequence[Length],
    *,
    number_bytes: int,
    texts: bool = False,
) -> list[Estimate]:
    """The size of the signals of some texts, for each codec.

    Args:
        number_bytes: of a weight of the teacher's head.
        texts: whether the texts are kept too.

    Raises:
        LimbeckError: the codec makes no sense for this teacher.
    """
    lengths = {codec: [*train, *held]} if codec == heldout else {codec: train, heldout: held}
    return [_of(codec, frame, some, number_bytes, texts) for codec, some in lengths.items() if some]


def _of(codec: Codec, frame: Frame, lengths: Sequence[Length], number_bytes: int, texts: bool) -> Estimate:
    codec.check(frame)
    per_token, shards, responses, size = bytes_per_token(codec, frame), 0, 0, 0
    for length in lengths:
        shards += responses == 0
        responses, size = responses + 1, size + length.loss * per_token
        if responses >= SHARD_RESPONSES or size >= SHARD_BYTES:
            responses = size = 0
    return Estimate(
        codec=codec,
        responses=len(lengths),
        tokens=sum(length.loss for length in lengths),
        per_token=per_token,
        shards=shards,
        shared=codec.shared_bytes(frame, number_bytes),
        texts=sum(length.ids * id_bytes(frame.vocab_size) + TEXT_INDEX_BYTES for length in lengths) if texts else 0,
    )


def total_bytes(estimates: Sequence[Estimate]) -> int:
    """Bytes of the whole folder."""
    return _MANIFEST_BYTES + sum(one.bytes for one in estimates)
