"""Prompts in a scratch file while a source is read: of each its id, its place and its split are in memory."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Self, overload

from limbeck.prompts.io import line_of, prompt_of_line
from limbeck.types import Prompt, Split


class ScratchFile:
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
        self.answered.append(prompt.answered)

    def __getitem__(self, place: int) -> Prompt:
        return prompt_of_line(self.line(place))

    def line(self, place: int) -> str:
        """The line of a prompt in a file of them."""
        start, self._at_end = self._starts[place], False
        self._file.seek(start)
        return self._file.read(self._starts[place + 1] - start).decode()

    def since(self, first: int) -> FiledPrompts:
        """The prompts from a place on, in the order of their ids."""
        places = array("q", sorted(range(first, len(self)), key=self.ids.__getitem__))
        return FiledPrompts(self, places, array("b", map(self.heldout.__getitem__, places)))


class FiledPrompts(Sequence[Prompt]):
    """Prompts of a scratch file, made when they are asked for.

    Args:
        places: in the file.
        heldout: for each, 1 where it is held out, whatever the file says.
    """

    def __init__(self, scratch: ScratchFile, places: array[int], heldout: array[int]):
        self.scratch, self.places, self.heldout = scratch, places, heldout

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> FiledPrompts: ...
    def __getitem__(self, index: int | slice) -> Prompt | FiledPrompts:
        if isinstance(index, slice):
            return FiledPrompts(self.scratch, self.places[index], self.heldout[index])
        prompt = self.scratch[self.places[index]]
        split: Split = "heldout" if self.heldout[index] else "train"
        return prompt if prompt.split == split else replace(prompt, split=split)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> Iterator[str]:
        """The ids of the prompts."""
        return (f"{self.scratch.ids[place]:016x}" for place in self.places)

    @property
    def answered(self) -> int:
        """Number of the prompts with a reference answer."""
        return sum(map(self.scratch.answered.__getitem__, self.places))

    @property
    def lines(self) -> Iterator[str]:
        """The lines of the prompts in a file of them."""
        for index, place in enumerate(self.places):
            same = self.scratch.heldout[place] == self.heldout[index]
            yield self.scratch.line(place) if same else line_of(self[index])

    def of(self, split: Split) -> FiledPrompts:
        return self._chosen(held == (split == "heldout") for held in self.heldout)

    def without(self, ids: Set[str]) -> FiledPrompts:
        """All but some prompts."""
        return self._chosen(name not in ids for name in self.ids)

    def trained_on(self, ids: Set[str]) -> FiledPrompts:
        """The same prompts, of which some are no longer held out."""
        heldout = (held and name not in ids for held, name in zip(self.heldout, self.ids, strict=True))
        return FiledPrompts(self.scratch, self.places, array("b", heldout))

    def merged(self, others: FiledPrompts) -> FiledPrompts:
        """These and other prompts of the same file, in the order of their ids."""
        places, heldout = self.places + others.places, self.heldout + others.heldout
        order = sorted(range(len(places)), key=lambda index: self.scratch.ids[places[index]])
        chosen = array("q", map(places.__getitem__, order))
        return FiledPrompts(self.scratch, chosen, array("b", map(heldout.__getitem__, order)))

    def _chosen(self, which: Iterable[bool]) -> FiledPrompts:
        kept = array("b", which)
        places, heldout = (array(column.typecode, compress(column, kept)) for column in (self.places, self.heldout))
        return FiledPrompts(self.scratch, places, heldout)


def lines_of(prompts: Iterable[Prompt]) -> Iterator[str]:
    """The lines of prompts in a file of them."""
    return prompts.lines if isinstance(prompts, FiledPrompts) else map(line_of, prompts)


def ids_of(prompts: Sequence[Prompt]) -> Iterator[str]:
    """The ids of prompts, which are not made for it."""
    return prompts.ids if isinstance(prompts, FiledPrompts) else (prompt.id for prompt in prompts)
