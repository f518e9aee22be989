"""Writing a store: one process at a time, shard by shard; what a kill left half written counts for nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from limbeck.runtime.files import link
from limbeck.runtime.folders import partial_in, remove
from limbeck.runtime.locks import exclusive
from limbeck.runtime.records import fingerprint
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.codecs import codec_tree
from limbeck.teachers.store.manifest import MANIFEST, Manifest, read_manifest, require_same, write_manifest
from limbeck.teachers.store.reader import Store, sealed_shards, shared_file, shared_hash
from limbeck.teachers.store.seals import read_record, seal_of, write_sealed_file
from limbeck.teachers.store.shards import Columns, OpenShard, write_shard_file
from limbeck.teachers.store.texts import Text, text_tensors
from limbeck.teachers.store.verifying import faults
from limbeck.types import Head, Json, LimbeckError

if TYPE_CHECKING:
    from torch import Tensor

# A shard ends with the first of the two: what is lost by a kill is at most one, and files stay few.
SHARD_RESPONSES = 256
SHARD_BYTES = 256 << 20


class Entry(NamedTuple):
    columns: Columns
    text: Text | None


@dataclass(frozen=True, kw_only=True)
class Group:
    """What the responses of one shard have in common."""

    codec: Codec
    sampling: Json | None

    @property
    def key(self) -> str:
        return fingerprint({"codec": codec_tree(self.codec), "sampling": self.sampling})


@dataclass(kw_only=True)
class ShardFiller(ABC):
    """Signals that are added one by one and written when their shard is full."""

    manifest: Manifest
    shard_responses: int = SHARD_RESPONSES
    _waiting: dict[str, tuple[Group, dict[bytes, Entry]]] = field(default_factory=dict)

    @abstractmethod
    def shared(self, codec: Codec, make: Callable[[], tuple[Head, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """The tensors that all tokens of a codec share; made, where there are none yet."""

    @abstractmethod
    def _write(self, group: Group, entries: Mapping[bytes, Entry]) -> None:
        """Write a shard."""

    def add(
        self,
        codec: Codec,
        address: bytes,
        columns: Columns,
        text: Text | None = None,
        sampling: Json | None = None,
    ) -> None:
        """Add the signal of an address; it is on disk when its shard is full, or with `flush`.

        Args:
            text: that it belongs to, where the teacher wrote it.
            sampling: how it was written.
        """
        group = Group(codec=codec, sampling=sampling if text else None)
        waiting = self._waiting.setdefault(group.key, (group, {}))[1]
        waiting[address] = Entry(columns, text)
        size = sum(column.nbytes for entry in waiting.values() for column in entry.columns.values())
        if len(waiting) >= self.shard_responses or size >= SHARD_BYTES:
            self._end(group.key)

    def flush(self) -> None:
        """Write what waits for its shard to fill."""
        for key in list(self._waiting):
            self._end(key)

    def _end(self, key: str) -> None:
        group, entries = self._waiting.pop(key)
        self._write(group, entries)


@dataclass(kw_only=True)
class StoreWriter(ShardFiller):
    """An open store to which signals are added.

    Attributes:
        store: what it holds already.
        following: number of the next shard.
    """

    store: Store
    following: int

    def shared(self, codec: Codec, make: Callable[[], tuple[Head, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """The tensors that all tokens of a codec share; made, where the store has none yet."""
        self.describe()
        path = shared_file(self.store.path, codec)
        if not seal_of(path).exists():
            from safetensors.torch import save_file

            head, tensors = make()
            if tensors:
                record = {"scale": head.scale, "softcap": head.softcap}
                write_sealed_file(path, lambda file: save_file(dict(tensors), file), record)
                self._remove_strangers(codec)
        return self.store.shared(codec)

    def _remove_strangers(self, codec: Codec) -> None:
        """Remove shards that were made for another head than the one that has just been written."""
        for shard in sealed_shards(self.store.path):
            seal = read_record(seal_of(shard))
            if seal["codec"] == codec_tree(codec) and seal["shared"] != shared_hash(self.store.path, codec):
                remove(seal_of(shard))
                remove(shard)
        self._forget()

    def holds(self, address: bytes) -> bool:
        """Whether the signal of an address was added, by this process or an earlier one; see `Store.locate`."""
        return address in self.store.places or any(address in waiting for _, waiting in self._waiting.values())

    def describe(self) -> None:
        """Write the manifest, where this is the first that the store holds."""
        if not (self.store.path / MANIFEST).exists():
            write_manifest(self.store.path, self.manifest)

    def adopt(self, shard: Path) -> None:
        """Take over a whole shard of a store with the same manifest: linked where the disk allows it."""
        path = self._new_shard()
        link(shard, path)
        link(seal_of(shard), seal_of(path))
        self._forget()

    def take_in(self, shard: Path, codec: Codec, number: int) -> None:
        """Take over a whole shard that was written outside any store (`write_shard_file`), and seal it; as the one of
        that number, which may be there already."""
        path = self.store.path / f"{number:06d}.safetensors"
        if seal_of(path).exists():
            return
        open_shard = OpenShard(shard)
        record = self._record(codec, None, responses=len(open_shard), tokens=open_shard.tokens)
        open_shard.close()
        write_sealed_file(path, partial(link, shard), record)
        self._forget()

    def take_in_next(self, shard: Path, codec: Codec) -> None:
        """The same, as the next one."""
        self.take_in(shard, codec, self.following)
        self.following += 1

    def _new_shard(self) -> Path:
        path = self.store.path / f"{self.following:06d}.safetensors"
        self.following += 1
        return path

    def _forget(self) -> None:
        """Have the store look for its shards again."""
        vars(self.store).pop("seals", None)

    def _write(self, group: Group, entries: Mapping[bytes, Entry]) -> None:
        path, columns = self._new_shard(), {address: entry.columns for address, entry in entries.items()}
        texts = [text for address in sorted(entries) if (text := entries[address].text) is not None]
        more = text_tensors(texts, self.manifest.frame.vocab_size) if texts else {}
        tokens = sum(len(next(iter(each.values()))) for each in columns.values())
        record = self._record(group.codec, group.sampling, responses=len(entries), tokens=tokens)
        write_sealed_file(path, partial(write_shard_file, entries=columns, more=more), record)
        self._forget()

    def _record(self, codec: Codec, sampling: Json | None, *, responses: int, tokens: int) -> Json:
        """What a shard's seal says of its content."""
        return {
            "store": self.manifest.fingerprint,
            "codec": codec_tree(codec),
            "shared": shared_hash(self.store.path, codec),
            "sampling": sampling,
            "responses": responses,
            "tokens": tokens,
        }


@contextmanager
def writing(path: Path, manifest: Manifest, *, say: Callable[[str], Any]) -> Iterator[StoreWriter]:
    """A store to add to, made where there is none; no other process can write to it meanwhile.

    What is half written or damaged is removed first, so that it is captured again.

    Raises:
        LimbeckError: another process writes to it, or it was captured with something else.
    """
    if path.is_file():
        raise LimbeckError(f"{path} is a file; expected a folder for the store, or a name that is free")
    with (
        exclusive(path, remedy="wait for it, or give this capture a store of its own", warn=say),
        writing_alone(path, manifest, say=say) as writer,
    ):
        yield writer


@contextmanager
def writing_alone(
    path: Path, manifest: Manifest, *, say: Callable[[str], Any], shard_responses: int = SHARD_RESPONSES
) -> Iterator[StoreWriter]:
    """The same in a folder that no other process can have, such as one of a run.

    Raises:
        LimbeckError: it was captured with something else.
    """
    path.mkdir(parents=True, exist_ok=True)
    for left in partial_in(path):
        remove(left)
    _require_manifest(path, manifest)
    for fault in faults(path):
        say(f"store: {fault}; it is captured again")
        remove(fault.path.with_suffix(".safetensors"))
        remove(fault.path.with_suffix(".json"))
    following = max((int(shard.stem) for shard in sealed_shards(path)), default=-1) + 1
    writer = StoreWriter(store=Store(path), manifest=manifest, following=following, shard_responses=shard_responses)
    try:
        yield writer
    except KeyboardInterrupt:
        # What is scored is kept.
        writer.flush()
        raise
    writer.flush()


def _require_manifest(path: Path, manifest: Manifest) -> None:
    """Refuse a folder that is no store, and the store of another manifest."""
    file = path / MANIFEST
    if not file.exists():
        # One that has lost its manifest alone gets it back.
        ours = all(_store_of(shard) == manifest.fingerprint for shard in sealed_shards(path))
        if other := next((p for p in path.iterdir() if p.name != ".lock" and not (ours and _is_sealed(p))), None):
            raise LimbeckError(f"{path} holds {other.name} and no {MANIFEST}, so it is no store; name an empty folder")
        return
    try:
        found = read_manifest(path)
    except LimbeckError:
        # Every seal says which store it belongs to: a damaged manifest is written again where all say this one.
        if any(_store_of(shard) != manifest.fingerprint for shard in sealed_shards(path)):
            raise
        write_manifest(path, manifest)
        return
    require_same(path, found, manifest)


def _is_sealed(file: Path) -> bool:
    """Whether a file is one of a store's, or its seal."""
    return file.with_suffix(".safetensors").exists() and seal_of(file).exists()


def _store_of(shard: Path) -> str | None:
    try:
        return read_record(seal_of(shard)).get("store")
    except LimbeckError:
        return None
