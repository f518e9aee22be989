"""Prompts in a scratch file while a source is read: of each its id, its place and its split are in memory."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, overload

import numpy as np

from limbeck.prompts.io import line_of, prompt_of_line
from limbeck.types import Prompt, Split


class Shelf:
    """A scratch file of prompts that has no name and is gone at the end of its block, or of the process.

    Attributes:
        ids: of the prompts in the order they were put there, as numbers.
        heldout: for each, 1 where it is held out.
        answered: for each, 1 where it has a reference answer.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".prompts-", suffix=".partial")  # noqa: SIM115
        self._starts, self._at_end = array("q", [0]), True
        self.ids, self.heldout, self.answered = array("Q"), array("b"), array("b")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, prompt: Prompt) -> None:
        """Put a prompt there; its id is a hash in 16 hex digits."""
        if not self._at_end:
            self._file.seek(0, 2)
            self._at_end = True
        written = self._file.write(line_of(prompt).encode())
        self._starts.append(self._starts[-1] + written)
        self.ids.append(int(prompt.id, 16))
        self.heldout.append(prompt.split == "heldout")
        self.answered.append(prompt.completion is not None)

    def __getitem__(self, place: int) -> Prompt:
        return prompt_of_line(self.line(place))

    def line(self, place: int) -> str:
        """The line of a prompt in a file of them."""
        start, self._at_end = self._starts[place], False
        self._file.seek(start)
        return self._file.read(self._starts[place + 1] - start).decode()

    def since(self, first: int) -> ShelvedPrompts:
        """The prompts from a place on, in the order of their ids."""
        order = np.argsort(np.asarray(self.ids, np.uint64)[first:], kind="stable")
        return ShelvedPrompts(self, (order + first).astype(np.int64))


class ShelvedPrompts(Sequence[Prompt]):
    """Prompts of a shelf, made when they are asked for.

    Args:
        places: on the shelf.
        heldout: whether each is held out; None for what the shelf says.
    """

    def __init__(self, shelf: Shelf, places: np.ndarray, heldout: np.ndarray | None = None):
        self.shelf, self.places = shelf, places
        self.heldout = np.asarray(shelf.heldout, bool)[places] if heldout is None else heldout

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> ShelvedPrompts: ...
    def __getitem__(self, index: int | slice) -> Prompt | ShelvedPrompts:
        if isinstance(index, slice):
            return self._chosen(index)
        prompt = self.shelf[int(self.places[index])]
        split: Split = "heldout" if self.heldout[index] else "train"
        return prompt if prompt.split == split else replace(prompt, split=split)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> Iterator[str]:
        """The ids of the prompts."""
        return (f"{self.shelf.ids[place]:016x}" for place in self.places)

    @property
    def answered(self) -> int:
        """Number of the prompts with a reference answer."""
        return int(np.asarray(self.shelf.answered)[self.places].sum())

    @property
    def lines(self) -> Iterator[str]:
        """The lines of the prompts in a file of them."""
        for index, place in enumerate(self.places):
            same = bool(self.shelf.heldout[place]) == bool(self.heldout[index])
            yield self.shelf.line(place) if same else line_of(self[index])

    def of(self, split: Split) -> ShelvedPrompts:
        return self._chosen(self.heldout == (split == "heldout"))

    def without(self, ids: Collection[str]) -> ShelvedPrompts:
        """All but some prompts."""
        return self._chosen(~self._among(ids))

    def trained_on(self, ids: Collection[str]) -> ShelvedPrompts:
        """The same prompts, of which some are no longer held out."""
        return ShelvedPrompts(self.shelf, self.places, self.heldout & ~self._among(ids))

    def merged(self, others: ShelvedPrompts) -> ShelvedPrompts:
        """These and other prompts of the same shelf, in the order of their ids."""
        places = np.concatenate([self.places, others.places])
        order = np.argsort(np.asarray(self.shelf.ids, np.uint64)[places], kind="stable")
        return ShelvedPrompts(self.shelf, places[order], np.concatenate([self.heldout, others.heldout])[order])

    def _chosen(self, which: slice | np.ndarray) -> ShelvedPrompts:
        return ShelvedPrompts(self.shelf, self.places[which], self.heldout[which])

    def _among(self, ids: Collection[str]) -> np.ndarray:
        wanted = np.fromiter((int(name, 16) for name in ids), np.uint64, len(ids))
        return np.isin(np.asarray(self.shelf.ids, np.uint64)[self.places], wanted)


def lines_of(prompts: Iterable[Prompt]) -> Iterator[str]:
    """The lines of prompts in a file of them."""
    return prompts.lines if isinstance(prompts, ShelvedPrompts) else map(line_of, prompts)


def ids_of(prompts: Sequence[Prompt]) -> Iterator[str]:
    """The ids of prompts, which are not made for it."""
    return prompts.ids if isinstance(prompts, ShelvedPrompts) else (prompt.id for prompt in prompts)
