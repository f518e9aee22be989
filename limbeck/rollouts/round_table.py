"""The responses of a round in columns, made of its batches by the first rank, and the record that it is whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from limbeck.rollouts.io import read_batch
from limbeck.runtime.files import write_json
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import read_sealed, sealed
from limbeck.types import Response

WHOLE, TABLE = "round.json", "round.arrow"


def write_table(folder: Path, number: int, batches: Mapping[tuple[int, ...], Path]) -> None:
    """Write the table of a round, batch behind batch, and the record of its files.

    Args:
        batches: the file of each batch by the numbers of its prompts.

    Raises:
        LimbeckError: a batch is not what was written.
    """
    # Arrow takes a while to import, and recipes are read without it.
    from limbeck.rollouts.table import keep_columns

    responses = (in_round(read_batch(path, len(rows)), number) for rows, path in batches.items())
    keep_columns(folder / TABLE, chain.from_iterable(responses))
    record = folder / WHOLE
    if record.exists():
        # Of a version without tables, or one that was deleted since; all else is as it was.
        files = read_sealed(record)["files"] | {TABLE: sha256_of(folder / TABLE)}
    else:
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    write_json(record, sealed({"files": files}))


def is_recorded(table: Path) -> bool:
    """Whether the table of a round is there, and what was written."""
    record = table.with_name(WHOLE)
    if not (table.exists() and record.exists()):
        return False
    return read_sealed(record)["files"].get(table.name) == sha256_of(table)


def in_round(responses: Iterable[Response], number: int) -> list[Response]:
    """The responses with the round they belong to, which is a part of their ids; rounds are numbered from 0."""
    return [replace(response, round=number + 1) for response in responses]
