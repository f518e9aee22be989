"""Reading a whole store and comparing each file with what was sealed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from limbeck.teachers.store.codecs import read_codec
from limbeck.teachers.store.manifest import MANIFEST
from limbeck.teachers.store.reader import SHARDS, Store, sealed_shards, shared_file, shared_hash
from limbeck.teachers.store.seals import read_record, read_whole_seal, seal_of
from limbeck.types import Json, LimbeckError


@dataclass(frozen=True)
class Fault:
    """A damaged file of a store.

    Attributes:
        what: what is wrong with it.
    """

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path.name} {self.what}"


def verify(path: Path) -> list[Fault]:
    """Every file of a store that is not what was written, by reading all of it.

    Raises:
        LimbeckError: the folder is no store.
    """
    if not (path / MANIFEST).exists():
        Store(path).manifest  # noqa: B018
    try:
        read_record(path / MANIFEST)
    except LimbeckError:
        return [Fault(path / MANIFEST, "is damaged"), *faults(path)]
    return list(faults(path))


def faults(path: Path) -> Iterator[Fault]:
    """Every shard or head that is half written, not what was written, or does not belong to the others."""
    heads = {file.with_suffix(".safetensors") for file in path.glob("[a-z]*.json") if file.name != MANIFEST}
    missing = set[Path]()
    for file in sorted({*path.glob(SHARDS), *sealed_shards(path), *path.glob("[a-z]*.safetensors"), *heads}):
        seal = seal_of(file)
        if not seal.exists():
            yield Fault(file, "was not finished")
            continue
        try:
            record = read_record(seal)
        except LimbeckError:
            yield Fault(seal, "is damaged")
            continue
        try:
            read_whole_seal(file)
        except LimbeckError:
            yield Fault(file, "is damaged" if file.exists() else "is missing")
            continue
        if record.get("shared") and (fault := _of_head(path, file, record)) and fault.path not in missing:
            missing.add(fault.path)
            yield fault


def _of_head(path: Path, shard: Path, seal: Json) -> Fault | None:
    """What is wrong with the head that a shard was made for; where that is damaged, its own fault says so."""
    codec = read_codec(seal["codec"])
    head = shared_file(path, codec)
    if not head.exists() and not seal_of(head).exists():
        return Fault(head, "is missing")
    try:
        same = shared_hash(path, codec) == seal["shared"]
    except LimbeckError:
        return None
    return None if same else Fault(shard, "was made for another head")
