"""Responses in the run directory: one JSON object per line, ids exactly as sampled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from limbeck.runtime.files import whole_file, write_text
from limbeck.runtime.hashing import sha256_of
from limbeck.types import LimbeckError, Response, Sampling, TokenPrompt, shared_ids

_T = TypeVar("_T")
_FIELDS = tuple(f.name for f in fields(Response))


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write the responses; the file appears only when it is whole."""
    with whole_file(path) as partial:
        _write_lines(partial, responses)


def write_batch(path: Path, responses: Iterable[Response]) -> None:
    """Write the responses of a batch, which no record of a stage names yet; its checksum is beside it before it is."""
    with whole_file(path) as partial:
        _write_lines(partial, responses)
        write_text(_checksum_of(path), f"{sha256_of(partial)}  {path.name}\n")


def _write_lines(path: Path, responses: Iterable[Response]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(fields_of(r), ensure_ascii=False) + "\n" for r in responses)


def _checksum_of(path: Path) -> Path:
    """The file that holds the checksum of a batch, as sha256sum reads it."""
    return path.with_name(f"{path.name}.sha256")


def fields_of(response: Response) -> dict[str, Any]:
    """A response as plain values, without empty fields that only conversations or rollouts use."""
    row = {name: getattr(response, name) for name in _FIELDS}
    if response.sampling is not None:
        row["sampling"] = dict(sampling_fields(response.sampling))
    if not response.spans:
        del row["spans"]
    if not response.round:
        del row["round"]
    if not response.images:
        del row["images"]
    return row


@lru_cache(maxsize=64)
def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """Sampling settings as plain values, made once and shared: copy them before changing any."""
    return asdict(sampling)


def asked_line(prompt: TokenPrompt) -> str:
    """A line of a file of prompts in tokens."""
    row: dict[str, Any] = {"id": prompt.id, "ids": prompt.ids}
    row |= {"split": prompt.split} if prompt.split != "train" else {}
    row |= {"images": prompt.images} if prompt.images else {}
    return json.dumps(row) + "\n"


def read_asked(path: Path) -> list[TokenPrompt]:
    """The prompts of such a file.

    Raises:
        LimbeckError: a damaged line, with its number.
    """
    with path.open("rb") as file:
        return [_parse(line, path, number, _asked_of) for number, line in enumerate(file, start=1)]


def read_responses(path: Path) -> list[Response]:
    """The responses of a file.

    Raises:
        LimbeckError: a damaged line, with its number.
    """
    with path.open("rb") as file:
        return [_parse(line, path, number, response_from_json) for number, line in enumerate(file, start=1)]


def response_of_line(line: bytes, path: Path, number: int) -> Response:
    """The response of a line of a file.

    Args:
        path: the file, and `number` the line's from 1, for what is said of a damaged one.

    Raises:
        LimbeckError: it is damaged.
    """
    return _parse(line, path, number, response_from_json)


def read_batch(path: Path, count: int) -> list[Response]:
    """The responses of a batch.

    Raises:
        LimbeckError: a damaged line, another number of them, or a file that is not what was written.
    """
    responses = read_responses(path)
    require_batch(path, len(responses), count)
    return responses


def require_batch(path: Path, found: int, expected: int) -> None:
    """Check the number of responses in the file of a batch, and its checksum where it has one: older runs have none.

    Raises:
        LimbeckError: it holds another number of responses, or is not what was written.
    """
    if found != expected:
        raise LimbeckError(
            f"{path} is damaged (it holds {found} responses of {expected}); delete {path} and run the same command "
            "again"
        )
    checksum = _checksum_of(path)
    if checksum.exists() and checksum.read_bytes().split()[:1] != [sha256_of(path).encode()]:
        raise LimbeckError(
            f"{path} is damaged (its sha256 is not that in {checksum.name}); delete {path} and run the same command "
            "again"
        )


def _asked_of(fields: dict[str, Any]) -> TokenPrompt:
    _require_ids(fields["ids"])
    if not isinstance(fields["id"], str):
        raise TypeError("the id is no text")
    images = fields.get("images", [])
    if not all(isinstance(image, str) for image in images):
        raise TypeError("the ids of images are no texts")
    split = fields.get("split", "train")
    if split not in ("train", "heldout"):
        raise ValueError("its split is neither train nor heldout")
    return TokenPrompt(id=fields["id"], ids=shared_ids(fields["ids"]), split=split, images=tuple(images))


def _require_ids(ids: object) -> None:
    if not isinstance(ids, list | tuple) or set(map(type, ids)) - {int}:
        raise TypeError("the ids of tokens are no whole numbers")


def response_from_json(row: dict[str, Any]) -> Response:
    """A response from the plain values that `fields_of` and JSON make of it."""
    _require_ids(row["prompt_ids"])
    _require_ids(row["response_ids"])
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
    if row["sampling"] is not None:
        plain["sampling"] = sampling_from_json(row["sampling"])
    plain |= {name: shared_ids(row[name]) for name in ("prompt_ids", "response_ids")}
    if "spans" in row:
        plain["spans"] = tuple((start, end) for start, end in row["spans"])
    return Response(**plain)


def sampling_from_json(row: dict[str, Any]) -> Sampling:
    """Sampling settings from the plain values that `sampling_fields` and JSON make of them."""
    plain: dict[str, Any] = row | {"stop": tuple(row["stop"])}
    return Sampling(**plain)


def _parse(line: bytes, path: Path, number: int, read: Callable[[dict[str, Any]], _T]) -> _T:
    try:
        return read(json.loads(line))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LimbeckError(
            f"{path}:{number} is damaged ({error}); delete {path} and run the same command again"
        ) from None
