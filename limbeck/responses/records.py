"""Responses in the run directory: one JSON object a line, ids exactly as sampled."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from limbeck.flow import LimbeckError, Response, Sampling, TokenPrompt, shared_ids
from limbeck.jsonlines import json_lines
from limbeck.rundir import whole_file, write_text


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write all or nothing."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(fields_of(r), ensure_ascii=False) + "\n" for r in responses)


def fields_of(response: Response) -> dict[str, Any]:
    """A response as plain values; what only conversations have is left out of others."""
    row = {f.name: getattr(response, f.name) for f in fields(response)}
    if response.sampling is not None:
        row["sampling"] = asdict(response.sampling)
    if not response.spans:
        del row["spans"]
    return row


def write_asked(path: Path, prompts: Iterable[TokenPrompt]) -> None:
    """Write the prompts that the student is asked during training, as ids; all or nothing."""
    write_text(path, "".join(json.dumps({"id": p.id, "ids": p.ids}) + "\n" for p in prompts))


def read_asked(path: Path) -> list[TokenPrompt]:
    """The prompts of `write_asked`."""
    lines = [json.loads(line) for _, line in json_lines(path.read_text("utf-8"))]
    return [TokenPrompt(id=line["id"], ids=tuple(line["ids"])) for line in lines]


def read_responses(path: Path) -> list[Response]:
    """The responses of a file.

    Raises:
        LimbeckError: a damaged line, with its number.
    """
    with path.open("rb") as file:
        return [_parse(line, path, number) for number, line in enumerate(file, start=1)]


def response_of(row: dict[str, Any]) -> Response:
    """A response from the plain values that `fields_of` and JSON make of it."""
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
    if (sampling := row["sampling"]) is not None:
        plain["sampling"] = Sampling(**(sampling | {"stop": tuple(sampling["stop"])}))
    plain |= {name: shared_ids(row[name]) for name in ("prompt_ids", "response_ids")}
    if "spans" in row:
        plain["spans"] = tuple((start, end) for start, end in row["spans"])
    return Response(**plain)


def _parse(line: bytes, path: Path, number: int) -> Response:
    try:
        return response_of(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise LimbeckError(f"{path}:{number} is damaged ({error}); delete {path} and run `limbeck respond`") from None
