"""Scoring responses with all ranks of a launch into the store of a run: the files that one process would write.

A store is written in chunks of responses, each of which ends with all of its shards on disk. Here a chunk is a unit of
shared work: the rank that takes it writes its shards beside the store, and the first rank links them into it, in the
order of the chunks. What was scored before a kill is taken in by the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.pipeline.capturing import SHARD_ROWS, Capture, Scorer, by_address
from limbeck.runtime.files import read_json, whole_file, write_json
from limbeck.runtime.folders import remove
from limbeck.runtime.shared_work import Share
from limbeck.teachers.base import Teacher
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.manifest import Manifest
from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.shards import OpenShard, write_shard_file
from limbeck.teachers.store.writer import Entry, Group, ShardFiller, StoreWriter
from limbeck.types import Head, Response, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor


def capture_share(
    chunks: Chunks,
    manifest: Manifest,
    teacher: Scorer,
    share: Share,
    *,
    joined: Callable[[Chunks], None] = lambda chunks: None,
) -> None:
    """Score this rank's share of what a store lacks, as parts beside it.

    Args:
        joined: called after each chunk.
    """
    parts = _Parts(manifest=manifest, shard_responses=SHARD_ROWS, folder=chunks.parts)
    capture = Capture(parts, teacher, chunks.texts, None)
    for number in chunks.lacking:
        if chunks.has_part(number) or not share.take(number):
            continue
        parts.begin(number)
        capture.score_all(chunks.content(number), chunks.missing, lambda tokens: share.step())
        parts.end()
        share.finish(number)
        joined(chunks)
    if isinstance(teacher, Teacher):
        teacher.attend()


def capture_by_ranks(
    writer: StoreWriter,
    teacher: Scorer,
    responses: Sequence[Response],
    share: Share,
    *,
    reads: Callable[[TokenBatch], TokenBatch],
    advance: Callable[[int], None],
) -> None:
    """Score what a store lacks of some responses with all ranks, on the first one.

    Args:
        advance: called with the tokens that are in the store, or come into it.

    Raises:
        LimbeckError: another rank has ended or hangs; names it.
    """
    writer.describe()
    chunks = Chunks.of(writer.store.path, responses, reads)
    advance(sum(chunks.texts[address].tokens for address in chunks.texts if address not in chunks.missing))
    capture = Capture(writer, teacher, chunks.texts, None)
    waiting = list(chunks.lacking)

    def join(chunks: Chunks) -> None:
        while waiting and chunks.has_part(waiting[0]):
            # The head that all signals are of.
            _ = capture.shared
            number = waiting.pop(0)
            chunks.take_in(number, writer)
            advance(sum(text.tokens for address, text in chunks.content(number).items() if address in chunks.missing))

    capture_share(chunks, writer.manifest, teacher, share, joined=join)
    share.wait()
    join(chunks)
    remove(chunks.parts)


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The responses of a store in the chunks that are scored at a time, the longest first.

    Attributes:
        texts: by address.
        missing: addresses that the store lacked at the beginning.
        parts: folder of what was scored and is not in the store yet.
    """

    texts: Mapping[bytes, Response]
    missing: frozenset[bytes]
    parts: Path

    @classmethod
    def of(cls, store: Path, responses: Sequence[Response], reads: Callable[[TokenBatch], TokenBatch]) -> Chunks:
        texts, there = by_address(responses, reads), Store(store)
        there.locate(list(texts))
        return cls(texts=texts, missing=frozenset(texts.keys() - there.places.keys()), parts=store / "shares")

    @property
    def lacking(self) -> list[int]:
        """Numbers of the chunks of which the store lacks something."""
        count = -(-len(self.texts) // SHARD_ROWS)
        return [number for number in range(count) if not self.missing.isdisjoint(self._addresses(number))]

    def content(self, number: int) -> dict[bytes, Response]:
        """The responses of a chunk by their addresses."""
        return {address: self.texts[address] for address in self._addresses(number)}

    def _addresses(self, number: int) -> list[bytes]:
        return self._order[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]

    @cached_property
    def _order(self) -> list[bytes]:
        return list(self.texts)

    def has_part(self, number: int) -> bool:
        """Whether a chunk was scored."""
        return _record_of(self.parts, number).exists()

    def take_in(self, number: int, writer: StoreWriter) -> None:
        """Link the shards of a chunk into the store, but for those that it has: one may have been killed here."""
        record = _record_of(self.parts, number)
        for part in read_json(record)["shards"]:
            path = self.parts / part["file"]
            open_shard = OpenShard(path)
            addresses = open_shard.addresses
            open_shard.close()
            if not all(writer.holds(address) for address in addresses):
                writer.take_in_next(path, writer.manifest.codecs[part["codec"]])
        record.unlink()


@dataclass(kw_only=True)
class _Parts(ShardFiller):
    """Shards outside of any store, of one chunk after another."""

    folder: Path
    _number: int = 0
    _shards: list[dict[str, str | int]] = field(default_factory=list)

    def shared(self, codec: Codec, make: Callable[[], tuple[Head, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        return dict(make()[1])

    def begin(self, number: int) -> None:
        self._number, self._shards = number, []

    def end(self) -> None:
        """Write what waits, and then that the chunk is whole."""
        self.flush()
        write_json(_record_of(self.folder, self._number), {"shards": self._shards})

    def _write(self, group: Group, entries: Mapping[bytes, Entry]) -> None:
        name = f"{self._number:06d}-{len(self._shards)}.safetensors"
        columns = {address: entry.columns for address, entry in entries.items()}
        with whole_file(self.folder / name) as file:
            write_shard_file(file, columns, {})
        self._shards.append({"file": name, "codec": list(self.manifest.codecs).index(group.codec)})


def _record_of(parts: Path, number: int) -> Path:
    """The file that says that a chunk is whole, and names its shards."""
    return parts / f"{number:06d}.json"
