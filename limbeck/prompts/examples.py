"""Rows of a source on their way to examples: all of one format, their columns counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from limbeck.prompts.columns import ColumnTally
from limbeck.prompts.formats import Example, Mapped, family_of, read_row, rename_fields
from limbeck.prompts.images import RowImages
from limbeck.prompts.readers import PlacedRow
from limbeck.types import LimbeckError

PlacedExample = tuple[Example, str]


@dataclass
class ExampleReader:
    """Reader of the rows of a source (see `limbeck.prompts.sources.load_prompts`).

    Attributes:
        given: the rows.
        rows: their number, once they are read.
    """

    given: Iterable[PlacedRow]
    fields: Mapping[Mapped, str] | None
    columns: ColumnTally
    images: RowImages | None
    rewrite: Callable[[PlacedRow], Mapping[str, Any]] | None
    rows: int = 0

    def examples(self) -> Iterator[PlacedExample]:
        """The examples of all rows, each with its place."""
        first: PlacedRow | None = None
        expected = ""
        for placed in self.given:
            seen = self.columns.seen_in(placed)
            if self.rewrite is not None:
                placed = PlacedRow(self.rewrite(placed), placed.where, placed.folder)
            given = self.columns.kept(placed)
            row = given if self.fields is None else rename_fields(given, self.fields, placed.where)
            family = family_of(row, placed.where)
            if first is None:
                first, expected = placed, family
            elif family != expected:
                raise LimbeckError(
                    f"{placed.where}: got the format {family!r} after {expected!r} in {first.where}; "
                    "put rows of different formats into different sources"
                )
            found = read_row(row, family, placed.where, images=self.images is not None)
            if self.images is not None:
                found = self.images.placed(found, given, placed)
            if seen:
                found = [replace(example, columns=seen) for example in found]
            yield from ((example, placed.where) for example in found)
            self.columns.count(given)
            self.rows += 1
        self.columns.finish()
