"""Rows as columns of an Arrow file that is mapped into memory: a process holds the rows it is at and not all.

The same file is opened in no time, whatever the number of its rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np
import pyarrow as pa

from limbeck.runtime.files import whole_file
from limbeck.types import LimbeckError

# Rows of a record batch; all but the last have as many, so that a row is found by division.
ROWS = 4096
# Rows that become text, or Python's own objects, at a time.
AT_A_TIME = 256
INT32S = pa.list_(pa.int32())
Row = TypeVar("Row")


class Rows(Sequence[Row]):
    """Rows that are made when they are asked for.

    Args:
        batches: all rows of a file.
        places: those that belong to the sequence, in its order.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], places: np.ndarray | None = None):
        self.batches = batches
        self._rows = batches[0].num_rows if batches else 1
        count = sum(batch.num_rows for batch in batches)
        self.places = np.arange(count, dtype=np.int32) if places is None else places

    @abstractmethod
    def made_of(self, some: pa.RecordBatch) -> Iterator[Row]:
        """The rows of a piece of the file."""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Row | Self:
        if isinstance(index, slice):
            return type(self)(self.batches, self.places[index])
        return self.at(int(self.places[index]))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), AT_A_TIME):
            numbers, rows = np.divmod(self.places[start : start + AT_A_TIME], self._rows)
            # Places of a split lie in few batches, one behind the other.
            ends = (np.flatnonzero(np.diff(numbers)) + 1).tolist()
            for begin, end in pairwise([0, *ends, len(rows)]):
                yield from self.made_of(self.batches[int(numbers[begin])].take(pa.array(rows[begin:end])))

    def at(self, place: int) -> Row:
        """The row at a place of the file."""
        number, row = divmod(place, self._rows)
        return next(self.made_of(self.batches[number].slice(row, 1)))

    def several(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of some numbers in the sequence, in that order; read together, they cost less than one by one."""
        places = self.places[np.asarray(numbers, np.intp)]
        # In the order of the file, so that those of one batch are read at once.
        order = np.argsort(places, kind="stable")
        found = dict(zip(order.tolist(), self.taken(places[order]), strict=True))
        return [found[number] for number in range(len(found))]

    def taken(self, places: np.ndarray) -> Self:
        """The rows at some places of the file."""
        return type(self)(self.batches, places.astype(np.int32))

    def followed_by(self, others: Self) -> Self:
        """These rows and others of the same file."""
        return self.taken(np.concatenate([self.places, others.places]))

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column."""
        for place in self.places.tolist():
            number, row = divmod(place, self._rows)
            yield self.batches[number].column(name)[row].as_py()

    def lengths_in(self, name: str) -> np.ndarray:
        """Lengths of the lists of a column."""
        found = [lengths(batch, name) for batch in self.batches]
        return np.concatenate([*found, np.empty(0, np.int32)])[self.places]


@contextmanager
def written(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """A file of columns that is written batch by batch, whole or not at all; all batches but the last have `ROWS`."""
    with whole_file(path) as columns, pa.OSFile(str(columns), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield writer


def write_rows(
    path: Path, schema: pa.Schema, rows: Iterable[Row], piece_of: Callable[[Sequence[Row]], pa.RecordBatch]
) -> None:
    """Write rows as columns, whole or not at all; few of them are in memory at a time."""
    left = iter(rows)
    with written(path, schema) as writer:
        while pieces := [piece_of(some) for _ in range(ROWS // AT_A_TIME) if (some := list(islice(left, AT_A_TIME)))]:
            (batch,) = pa.Table.from_batches(pieces).combine_chunks().to_batches()
            writer.write_batch(batch)


def mapped(path: Path, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The batches of a file that `written` wrote.

    Raises:
        LimbeckError: it is damaged, or holds something else.
    """
    try:
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source)
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
            for batch in batches:
                batch.validate()
            if not file.schema.equals(schema) or len({batch.num_rows for batch in batches[:-1]}) > 1:
                raise pa.ArrowInvalid("its columns are other ones")
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise LimbeckError(f"{path} is damaged ({reason}); delete {path} and run the same command again") from None
    return batches


def lengths(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Lengths of the lists of a column."""
    return np.diff(batch.column(name).offsets.to_numpy())


def list_column(rows: Iterable[Sequence[int]]) -> pa.ListArray:
    """A column of ids."""
    rows = list(rows)
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.fromiter(chain.from_iterable(rows), np.int32, int(ends[-1])))


def lists_of(column: pa.ListArray) -> Iterator[tuple[int, ...]]:
    """The ids of each row of a column."""
    ids = column.values.to_numpy()
    return (tuple(ids[start:end].tolist()) for start, end in pairwise(column.offsets.to_pylist()))
