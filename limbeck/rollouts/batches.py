"""Responses of many batches, which stay in their files until one is asked for."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

from limbeck.rollouts.io import require_batch, response_of_line
from limbeck.types import Response


class _InOneRow(Sequence[Response]):
    """Responses that are read when they are asked for."""

    @abstractmethod
    def at(self, index: int) -> Response:
        """The response of a number."""

    @overload
    def __getitem__(self, index: int) -> Response: ...
    @overload
    def __getitem__(self, index: slice) -> list[Response]: ...
    def __getitem__(self, index: int | slice) -> Response | list[Response]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.at(index)


class BatchedResponses(_InOneRow):
    """The responses of some batches in one row. Of each its place in a file is in memory.

    Args:
        batches: for the file of each batch, the places of its responses in the row, in the order of its lines.

    Raises:
        LimbeckError: a file has another number of lines, or is not what was written.
    """

    def __init__(self, batches: Mapping[Path, Sequence[int]]):
        count = sum(map(len, batches.values()))
        self._paths = tuple(batches)
        self._file, self._line, self._start = (array(kind, [0]) * count for kind in "iiq")
        for number, (path, places) in enumerate(batches.items()):
            starts = _starts_of_lines(path)
            require_batch(path, len(starts), len(places))
            for line, (place, start) in enumerate(zip(places, starts, strict=True), start=1):
                self._file[place], self._line[place], self._start[place] = number, line, start

    def __len__(self) -> int:
        return len(self._file)

    def at(self, index: int) -> Response:
        path = self._paths[self._file[index]]
        with path.open("rb") as file:
            file.seek(self._start[index])
            return response_of_line(file.readline(), path, self._line[index])


class InterleavedResponses(_InOneRow):
    """The responses of several rows in one row; they stay where they are until one is asked for.

    Args:
        parts: for each row of responses, the places of its responses in the one row, in its order.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Response], Sequence[int]]]):
        count = sum(len(places) for _, places in parts)
        self._parts = tuple(responses for responses, _ in parts)
        self._part, self._place = (array("i", [0]) * count for _ in range(2))
        for number, (responses, places) in enumerate(parts):
            assert len(responses) == len(places), "one place for each response"
            for own, place in enumerate(places):
                self._part[place], self._place[place] = number, own

    def __len__(self) -> int:
        return len(self._part)

    def at(self, index: int) -> Response:
        return self._parts[self._part[index]][self._place[index]]


def _starts_of_lines(path: Path) -> array[int]:
    starts, end = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            starts.append(end)
            end += len(line)
    return starts
