"""Responses in the run directory: one JSON object a line, ids exactly as sampled."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limbeck.flow import LimbeckError, Response, Sampling
from limbeck.rundir import write_text


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write all or nothing."""
    write_text(path, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in responses))


def read_responses(path: Path) -> list[Response]:
    """The responses of a file.

    Raises:
        LimbeckError: a damaged line, with its number.
    """
    with path.open("rb") as file:
        return [_parse(line, path, number) for number, line in enumerate(file, start=1)]


def _parse(line: bytes, path: Path, number: int) -> Response:
    try:
        fields: dict[str, Any] = json.loads(line)
        sampling = fields["sampling"]
        if sampling is not None:
            fields["sampling"] = Sampling(**(sampling | {"stop": tuple(sampling["stop"])}))
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = tuple(value)
        return Response(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise LimbeckError(f"{path}:{number} is damaged ({error}); delete {path} and run `limbeck respond`") from None
