"""Merging stores of one teacher, template and form into one: shards are linked where nothing in them is double."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limbeck.runtime.files import link
from limbeck.teachers.store.manifest import require_same
from limbeck.teachers.store.reader import Store, shared_file
from limbeck.teachers.store.seals import read_whole_seal, seal_of
from limbeck.teachers.store.writer import StoreWriter, writing
from limbeck.types import LimbeckError


def merge(target: Path, sources: Sequence[Path], *, say: Callable[[str], Any]) -> Store:
    """Add everything that some stores hold to another one, each text once.

    Raises:
        LimbeckError: one is not of the same teacher, tokenizer, template and form, or damaged.
    """
    stores = [Store(path) for path in sources]
    for store in stores:
        if store.path.resolve() == target.resolve():
            raise LimbeckError(f"{target} is the store to write and one to read; name another one to write")
        require_same(store.path, store.manifest, stores[0].manifest)
        for codec in store.manifest.codecs:
            if (file := shared_file(store.path, codec)).exists():
                _require_same_file(file, shared_file(stores[0].path, codec))
    with writing(target, stores[0].manifest, say=say) as writer:
        for store in stores:
            _add(writer, store)
    return Store(target)


def _require_same_file(file: Path, first: Path) -> None:
    """Refuse signals that were made for another head, such as two that the codec svd has approximated apart."""
    if read_whole_seal(file)["sha256"] != read_whole_seal(first)["sha256"]:
        raise LimbeckError(
            f"{file} is not the same as {first}, so that the signals of one are none with the other; capture both "
            "sets of texts into one store"
        )


def _add(writer: StoreWriter, store: Store) -> None:
    writer.describe()
    for codec in store.manifest.codecs:
        file, ours = shared_file(store.path, codec), shared_file(writer.store.path, codec)
        if file.exists() and not seal_of(ours).exists():
            link(file, ours)
            link(seal_of(file), seal_of(ours))
        elif file.exists():
            _require_same_file(file, ours)
    for path in store.seals:
        read_whole_seal(path)
        addresses = store.addresses_in(path)
        store.locate(addresses)
        writer.store.locate(addresses)
        new = [address for address in addresses if not writer.holds(address)]
        if len(new) == len(addresses):
            writer.adopt(path)
            continue
        for address in new:
            codec, columns = store.entry(address)
            writer.add(codec, address, columns, *store.text(address))
