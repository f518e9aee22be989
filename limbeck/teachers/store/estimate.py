"""The size of a store before anything is captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.teachers.store.addresses import ADDRESS
from limbeck.teachers.store.base import Codec, Frame, bytes_per_token
from limbeck.teachers.store.writer import SHARD_BYTES, SHARD_RESPONSES

# Address, first row, number of rows, checksum.
INDEX_BYTES = ADDRESS + 8 + 8 + 4
# Header of a shard's file and its seal, and the manifest: they hold a few names and numbers.
_SHARD_BYTES, _MANIFEST_BYTES = 1_100, 1_300


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What some texts will take on disk.

    Attributes:
        per_token: of the signals, without index and head.
        shared: what all tokens share, such as a head.
    """

    codec: Codec
    responses: int
    tokens: int
    per_token: int
    shards: int
    shared: int

    @property
    def bytes(self) -> int:
        rows = self.per_token * self.tokens + self.responses * INDEX_BYTES
        return rows + self.shards * _SHARD_BYTES + self.shared


def estimate(
    codec: Codec, heldout: Codec, frame: Frame, train: Sequence[int], held: Sequence[int], *, number_bytes: int
) -> list[Estimate]:
    """The size of the signals of texts with so many tokens each, for each codec.

    Args:
        number_bytes: of a weight of the teacher's head.

    Raises:
        LimbeckError: the codec makes no sense for this teacher.
    """
    lengths = {codec: [*train, *held]} if codec == heldout else {codec: train, heldout: held}
    return [_of(codec, frame, some, number_bytes) for codec, some in lengths.items() if some]


def _of(codec: Codec, frame: Frame, lengths: Sequence[int], number_bytes: int) -> Estimate:
    codec.check(frame)
    per_token, shards, responses, size = bytes_per_token(codec, frame), 0, 0, 0
    for tokens in lengths:
        shards += responses == 0
        responses, size = responses + 1, size + tokens * per_token
        if responses >= SHARD_RESPONSES or size >= SHARD_BYTES:
            responses = size = 0
    return Estimate(
        codec=codec,
        responses=len(lengths),
        tokens=sum(lengths),
        per_token=per_token,
        shards=shards,
        shared=codec.shared_bytes(frame, number_bytes),
    )


def total_bytes(estimates: Sequence[Estimate]) -> int:
    """Bytes of the whole folder."""
    return _MANIFEST_BYTES + sum(one.bytes for one in estimates)
