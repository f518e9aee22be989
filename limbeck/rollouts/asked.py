"""Prompts in tokens, in a file that is mapped into memory: those of a run, and those that the student is asked.

responses/asked.jsonl    for people and other tools: one JSON object per line
responses/asked.arrow    the same for training
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import compute

from limbeck.rollouts.io import asked_line, read_asked
from limbeck.runtime.columns import INT32S, Rows, list_column, lists_of, mapped, write_rows
from limbeck.runtime.files import whole_file
from limbeck.types import Split, TokenPrompt

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("ids", INT32S),
        ("split", pa.string()),
        ("label", pa.string()),
        ("images", pa.list_(pa.string())),
    ]
)


class PromptTable(Rows[TokenPrompt]):
    """Prompts that are made when they are asked for."""

    def made_of(self, some: pa.RecordBatch) -> Iterator[TokenPrompt]:
        names, splits, labels, images = (some.column(i).to_pylist() for i in (0, 2, 3, 4))
        for name, ids, split, label, own in zip(
            names, lists_of(some.column("ids")), splits, labels, images, strict=True
        ):
            yield TokenPrompt(id=name, ids=ids, split=split, label=label, images=tuple(own))

    def of(self, split: Split) -> PromptTable:
        """Those of a split."""
        each = [compute.call_function("equal", [batch.column("split"), split]) for batch in self.batches]
        known = np.concatenate([*(one.to_numpy(zero_copy_only=False) for one in each), np.empty(0, bool)])
        return self.taken(self.places[known[self.places]])


def of_split(prompts: Sequence[TokenPrompt], split: Split) -> Sequence[TokenPrompt]:
    """The prompts of a split; those on disk stay there."""
    return prompts.of(split) if isinstance(prompts, PromptTable) else [p for p in prompts if p.split == split]


def with_ids(prompts: Sequence[TokenPrompt], takes: Callable[[str], bool]) -> Sequence[TokenPrompt]:
    """The prompts whose ids are wanted; those on disk stay there."""
    if not isinstance(prompts, PromptTable):
        return [prompt for prompt in prompts if takes(prompt.id)]
    return prompts.taken(prompts.places[np.fromiter(map(takes, prompts.column("id")), bool, len(prompts))])


def at_places(prompts: Sequence[TokenPrompt], places: Sequence[int]) -> Sequence[TokenPrompt]:
    """The prompts at some places of a row; those on disk stay there."""
    if not isinstance(prompts, PromptTable):
        return [prompts[place] for place in places]
    return prompts.taken(prompts.places[np.asarray(places, np.intp)])


def joined(first: Sequence[TokenPrompt], second: Sequence[TokenPrompt]) -> Sequence[TokenPrompt]:
    """Some prompts and then others; those of one file stay there."""
    if isinstance(first, PromptTable) and isinstance(second, PromptTable) and first.batches is second.batches:
        return first.followed_by(second)
    return [*first, *second]


def ids_of(prompts: Sequence[TokenPrompt]) -> Iterator[str]:
    """The ids of prompts."""
    return prompts.column("id") if isinstance(prompts, PromptTable) else (prompt.id for prompt in prompts)


def lengths_of(prompts: Sequence[TokenPrompt]) -> np.ndarray:
    """Tokens of each prompt."""
    if isinstance(prompts, PromptTable):
        return prompts.lengths_in("ids")
    return np.fromiter((len(prompt.ids) for prompt in prompts), np.int32, len(prompts))


def keep_asked(path: Path, prompts: Sequence[TokenPrompt]) -> None:
    """Write prompts for people (`path`, .jsonl) and for training (.arrow beside it), each whole or not at all."""
    with whole_file(path) as lines, lines.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(asked_line, prompts))
    write_table(path.with_suffix(".arrow"), prompts)


def open_asked(path: Path) -> Sequence[TokenPrompt]:
    """The prompts of `keep_asked`, or of a run of an earlier version, which has the lines alone.

    Raises:
        LimbeckError: a damaged file.
    """
    columns = path.with_suffix(".arrow")
    return PromptTable(mapped(columns, SCHEMA)) if columns.exists() else read_asked(path)


def write_table(path: Path, prompts: Iterable[TokenPrompt]) -> None:
    """Write prompts as columns, whole or not at all; few of them are in memory at a time."""
    write_rows(path, SCHEMA, prompts, _piece)


def _piece(prompts: Sequence[TokenPrompt]) -> pa.RecordBatch:
    columns = [
        pa.array([p.id for p in prompts]),
        list_column(p.ids for p in prompts),
        pa.array([p.split for p in prompts]),
        pa.array([p.label for p in prompts]),
        pa.array([list(p.images) for p in prompts], pa.list_(pa.string())),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def scratch_table(folder: Path, prompts: Iterable[TokenPrompt]) -> PromptTable:
    """Prompts in a file that has no name any more: it is gone with the table, or with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=folder, prefix=".asked-", suffix=".partial")
    os.close(number)
    try:
        write_table(Path(name), prompts)
        return PromptTable(mapped(Path(name), SCHEMA))
    finally:
        os.unlink(name)
