"""Append-only logs of expensive results, such as a server's answers: one JSON line each, on disk at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from limbeck.runtime.files import naming
from limbeck.types import Json, LimbeckError


def read_log(path: Path) -> Iterator[tuple[int, Json]]:
    """The entries with the numbers of their lines; a line that a kill cut off is dropped from the file first.

    Raises:
        LimbeckError: a line is no JSON object.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.read_bytes() if path.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged(path, number, error) from None
        if not isinstance(entry, dict):
            raise damaged(path, number, TypeError("no JSON object"))
        yield number, entry


def append_to_log(path: Path, entry: Json) -> None:
    """Append an entry; it is on disk when this returns."""
    with naming(path), path.open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def damaged(path: Path, number: int, error: Exception) -> LimbeckError:
    """The error for a line that is no entry."""
    return LimbeckError(f"{path}:{number} is damaged ({error}); delete the line and run the same command again")
