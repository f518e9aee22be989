"""A shard: signals of some responses in one safetensors file, column by column, and an index of their addresses.

    index.address  (R, 16)  uint8   ascending        index.first  (R,)  int64   its first row in the columns
    index.crc      (R,)     uint32  of its rows      index.tokens (R,)  int64   its rows
    column.NAME    (N, ...)         one row per token

The file is mapped into memory, and what a reading has touched is let go of at once: the memory of the process does not
grow with the size of a store. The checksum of a response is over its rows in all columns, in the order of their names.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.teachers.store.addresses import ADDRESS
from limbeck.teachers.store.seals import damaged
from limbeck.teachers.store.texts import Text, stop_of, text_checksum
from limbeck.types import LimbeckError

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

_DTYPES = {
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
}
_INDEX = ("address", "first", "tokens", "crc")
# The system maps pages beside the one that is read, up to so many bytes.
_AROUND = max(mmap.PAGESIZE, 1 << 16)
_OPEN_AT_A_TIME = 32
# Of the file's header: eight bytes with its length.
_PREFIX = 8


def shard_tensors(entries: Mapping[bytes, Columns]) -> dict[str, Array]:
    """The tensors of a shard's file: columns of some responses, by their addresses."""
    order = sorted(entries)
    names = sorted(entries[order[0]])
    tokens = np.array([len(entries[address][names[0]]) for address in order], dtype=np.int64)
    return {
        "index.address": np.frombuffer(b"".join(order), dtype=np.uint8).reshape(len(order), ADDRESS),
        "index.first": np.cumsum(tokens) - tokens,
        "index.tokens": tokens,
        "index.crc": np.array([checksum(entries[address]) for address in order], dtype=np.uint32),
        **{f"column.{name}": np.concatenate([entries[address][name] for address in order]) for name in names},
    }


def write_shard_file(path: Path, entries: Mapping[bytes, Columns], more: Mapping[str, Array]) -> None:
    """Write the file of a shard.

    Args:
        more: further tensors, in the order of the addresses.
    """
    from safetensors.numpy import save_file

    save_file(shard_tensors(entries) | dict(more), path)


def checksum(columns: Columns) -> int:
    """The checksum of a response."""
    found = 0
    for name in sorted(columns):
        found = zlib.crc32(np.ascontiguousarray(columns[name]).data.cast("B"), found)
    return found


@dataclass
class OpenShard:
    """A shard's file, mapped into memory.

    Raises:
        LimbeckError: at any reading, where the file is not a shard or not what was written.
    """

    path: Path

    def __post_init__(self) -> None:
        with self.path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise damaged(self.path, "it is empty") from None

    @cached_property
    def _tensors(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
        """Kind, shape and place in the file of each tensor."""
        try:
            length = int.from_bytes(self._map[:_PREFIX], "little")
            header = json.loads(self._map[_PREFIX : _PREFIX + length])
            found = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    first, end = entry["data_offsets"]
                    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
                    found[name] = (dtype, shape, _PREFIX + length + first)
                    if end - first != dtype.itemsize * int(np.prod(shape)) or _PREFIX + length + end > len(self._map):
                        raise ValueError(name)
            indexed = {found[f"index.{name}"][1][0] for name in _INDEX}
            rows = {shape[0] for name, (_, shape, _) in found.items() if name.startswith("column.")}
            if len(rows) != 1 or len(indexed) != 1 or indexed == {0}:
                raise ValueError("columns")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
            raise damaged(self.path, "it is no shard") from None
        return found

    def _rows(self, name: str, first: int, end: int) -> Array:
        """A copy of some rows of a tensor; the pages it was read from are let go of."""
        dtype, shape, place = self._tensors[name]
        row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        start, size = place + first * row, (end - first) * row
        if not 0 <= first <= end <= shape[0]:
            raise damaged(self.path, f"its index leads out of {name}")
        read = np.frombuffer(self._map, np.uint8, size, start).copy().view(dtype).reshape(end - first, *shape[1:])
        self._release(start, size)
        return read

    def _release(self, start: int, size: int) -> None:
        if size and hasattr(self._map, "madvise"):
            aligned = start - start % _AROUND
            end = min(-(-(start + size) // _AROUND) * _AROUND, len(self._map))
            self._map.madvise(mmap.MADV_DONTNEED, aligned, end - aligned)

    @property
    def addresses(self) -> list[bytes]:
        """The addresses of its responses."""
        rows = self._rows("index.address", 0, len(self))
        return [row.tobytes() for row in rows]

    def __len__(self) -> int:
        return self._tensors["index.address"][1][0]

    @property
    def tokens(self) -> int:
        """Tokens of all its responses."""
        return next(shape[0] for name, (_, shape, _) in self._tensors.items() if name.startswith("column."))

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [name.removeprefix("column.") for name in self._tensors if name.startswith("column.")]

    def places(self, wanted: Sequence[bytes]) -> dict[bytes, int]:
        """The numbers in the index of those of some addresses that are here."""
        return self._numbers("index.address", wanted)

    def texts_of(self, keys: Sequence[bytes]) -> dict[bytes, Text]:
        """The answers to those of some prompts that are here.

        Raises:
            LimbeckError: one is not what was written.
        """
        return {key: self._text(number) for key, number in self._numbers("text.key", keys).items()}

    def _text(self, number: int) -> Text:
        first, tokens, prompt, stop, crc = (
            int(self._rows(f"text.{name}", number, number + 1)[0])
            for name in ("first", "tokens", "prompt", "stop", "crc")
        )
        ids, ended = self._rows("text.ids", first, first + tokens), stop_of(stop)
        if ended is None or text_checksum(ids, ended) != crc:
            raise damaged(self.path, f"text {number} is not what was written")
        return Text(ids=tuple(ids.tolist()), prompt=prompt, stop=ended)

    def text(self, number: int) -> Text | None:
        """The text of a response; None where the shard has none."""
        return self._text(number) if "text.ids" in self._tensors else None

    def _numbers(self, name: str, wanted: Sequence[bytes]) -> dict[bytes, int]:
        """The places of some names in a tensor of them."""
        here_RA = self._rows(name, 0, len(self))
        order_R = np.argsort(_leading(here_RA), kind="stable")
        wanted_WA = np.frombuffer(b"".join(wanted), dtype=np.uint8).reshape(len(wanted), ADDRESS)
        # The first eight bytes as numbers; the others are compared where these are equal.
        found_W = order_R[np.searchsorted(_leading(here_RA)[order_R], _leading(wanted_WA)).clip(0, len(self) - 1)]
        same_W = (here_RA[found_W] == wanted_WA).all(1)
        return {address: int(n) for address, n, same in zip(wanted, found_W, same_W, strict=True) if same}

    def entry(self, number: int) -> dict[str, Array]:
        """The columns of a response, compared with its checksum.

        Raises:
            LimbeckError: they are not what was written.
        """
        first, tokens, crc = (int(self._rows(f"index.{name}", number, number + 1)[0]) for name in _INDEX[1:])
        columns = {name: self._rows(f"column.{name}", first, first + tokens) for name in self.names}
        if checksum(columns) != crc:
            raise damaged(self.path, f"response {number} is not what was written")
        return columns

    def close(self) -> None:
        self._map.close()


@dataclass
class OpenShards:
    """Shards that are opened when they are first read; those that were not read for longest are closed."""

    _open: OrderedDict[Path, OpenShard] = field(default_factory=OrderedDict)

    def __getitem__(self, path: Path) -> OpenShard:
        if path not in self._open:
            self._open[path] = OpenShard(path)
            if len(self._open) > _OPEN_AT_A_TIME:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]

    def close(self, path: Path) -> None:
        """Close a shard, where it is open."""
        if path in self._open:
            self._open.pop(path).close()


def _leading(addresses_RA: Array) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(addresses_RA).view(">u8")[:, 0].astype(np.uint64)


def require_layout(path: Path, columns: Columns, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse columns that are not those of a codec.

    Raises:
        LimbeckError: they have other names, kinds or shapes.
    """
    found = {name: (column.dtype.name, column.shape[1:]) for name, column in columns.items()}
    if found != dict(layout):
        raise LimbeckError(
            f"{path} holds {found}, expected {dict(layout)}; it was written by another version: capture it again"
        )
