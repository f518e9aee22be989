"""Responses as columns of an Arrow file that is mapped into memory, so that a rank holds the rows it is at and not all.

    responses/teacher.jsonl   for people and other tools: one JSON object per line
    responses/teacher.arrow   the same for training: ids as int32, opened in no time whatever their number

Both are written together. Where the second one is missing, as in runs of earlier versions, the first one is read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from limbeck.rollouts.io import fields_of, read_responses, sampling_fields, sampling_from_json
from limbeck.runtime.columns import (
    AT_A_TIME,
    INT32S,
    ROWS,
    Rows,
    lengths,
    list_column,
    lists_of,
    mapped,
    write_rows,
    written,
)
from limbeck.runtime.files import whole_file
from limbeck.types import Response, Sampling, Split

IDS = ("prompt_ids", "response_ids")
NUMBERS = ("logp", "sampled_logp")
_JSON = json.JSONEncoder(ensure_ascii=False)

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("author", pa.string()),
        ("prompt_ids", INT32S),
        ("response_ids", INT32S),
        ("stop", pa.string()),
        ("sampling", pa.string()),
        ("split", pa.string()),
        ("logp", pa.list_(pa.float64())),
        ("sampled_logp", pa.list_(pa.float64())),
        ("replaced", pa.int64()),
        ("spans", INT32S),
        ("round", pa.int64()),
        ("images", pa.list_(pa.string())),
    ]
)


class ResponseTable(Rows[Response]):
    """Responses that are made when they are asked for."""

    def made_of(self, some: pa.RecordBatch) -> Iterator[Response]:
        columns = [lists_of(column) if name in IDS else column.to_pylist() for name, column in _named(some)]
        for values in zip(*columns, strict=True):
            yield Response(**{name: _as_field(name, value) for name, value in zip(SCHEMA.names, values, strict=True)})

    @cached_property
    def lengths(self) -> np.ndarray:
        """`Response.length` of each."""
        return self.answer_lengths + self.lengths_in("prompt_ids")

    @property
    def answer_lengths(self) -> np.ndarray:
        """Ids of each response."""
        return self.lengths_in("response_ids")

    @property
    def prompt_ids(self) -> Iterator[str]:
        """`Response.prompt_id` of each."""
        return self.column("prompt_id")

    def answered(self, split: Split) -> NumberedResponses:
        """The responses of a split that have ids, by their place in the file."""
        kept = []
        for batch in self.batches:
            of_split = compute.call_function("equal", [batch.column("split"), split]).to_numpy(zero_copy_only=False)
            kept.append(of_split & (lengths(batch, "response_ids") > 0))
        places = np.flatnonzero(np.concatenate([*kept, np.empty(0, bool)]))
        return NumberedResponses(self.taken(places))


class NumberedResponses(Mapping[int, Response]):
    """Responses by their place in the file.

    Attributes:
        responses: the same in a row.
    """

    def __init__(self, responses: ResponseTable):
        self.responses = responses

    @cached_property
    def _known(self) -> np.ndarray:
        """For each place of the file up to the last, whether its response is one of these."""
        places = self.responses.places
        known = np.zeros(int(places.max(initial=-1)) + 1, bool)
        known[places] = True
        return known

    def __len__(self) -> int:
        return len(self.responses)

    def __iter__(self) -> Iterator[int]:
        return iter(self.responses.places.tolist())

    def __contains__(self, place: object) -> bool:
        return isinstance(place, int) and 0 <= place < len(self._known) and bool(self._known[place])

    def __getitem__(self, place: int) -> Response:
        if place not in self:
            raise KeyError(place)
        return self.responses.at(place)


def in_a_row(responses: Mapping[int, Response]) -> Sequence[Response]:
    """The responses of a mapping without their numbers; those on disk stay there."""
    return responses.responses if isinstance(responses, NumberedResponses) else list(responses.values())


def without(responses: Mapping[int, Response], rows: Collection[int]) -> Mapping[int, Response]:
    """The responses of a mapping but for some rows, in the same order."""
    if not isinstance(responses, NumberedResponses):
        left = set(rows)
        return {row: response for row, response in responses.items() if row not in left}
    every = responses.responses.places
    return NumberedResponses(responses.responses.taken(every[~np.isin(every, list(rows))]))


def lengths_of(responses: Sequence[Response]) -> np.ndarray:
    """`Response.length` of each."""
    if isinstance(responses, ResponseTable):
        return responses.lengths
    return np.fromiter((r.length for r in responses), np.int32, len(responses))


def answer_lengths_of(responses: Sequence[Response]) -> np.ndarray:
    """Ids of each response; as many enter the loss at most."""
    if isinstance(responses, ResponseTable):
        return responses.answer_lengths
    return np.fromiter((len(r.response_ids) for r in responses), np.int32, len(responses))


def prompts_of(responses: Sequence[Response]) -> Iterator[str]:
    """`Response.prompt_id` of each."""
    return responses.prompt_ids if isinstance(responses, ResponseTable) else (r.prompt_id for r in responses)


def keep_columns(path: Path, responses: Iterable[Response]) -> None:
    """Write responses for training alone (`path`, .arrow), whole or not at all; few of them are in memory at a time."""
    write_rows(path, SCHEMA, responses, _batch_of)


def keep_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write responses for people (`path`, .jsonl) and for training (.arrow beside it), each whole or not at all."""
    source = iter(responses)
    with (
        whole_file(path) as lines,
        lines.open("w", encoding="utf-8", newline="\n") as file,
        written(path.with_suffix(".arrow"), SCHEMA) as writer,
    ):
        while some := list(islice(source, ROWS)):
            batch = _batch_of(some)
            writer.write_batch(batch)
            # As text a batch takes ten times its room.
            for start in range(0, len(some), AT_A_TIME):
                file.writelines(_lines_of(some[start : start + AT_A_TIME], batch.slice(start, AT_A_TIME)))


def open_responses(path: Path) -> ResponseTable:
    """The responses of `keep_responses` or `keep_columns`.

    Raises:
        LimbeckError: a damaged file.
    """
    columns = path.with_suffix(".arrow")
    if not columns.exists():
        every = read_responses(path)
        return ResponseTable([_batch_of(every[i : i + ROWS]) for i in range(0, len(every), ROWS)])
    return ResponseTable(mapped(columns, SCHEMA))


def _batch_of(responses: Sequence[Response]) -> pa.RecordBatch:
    columns: dict[str, Any] = {name: [getattr(r, name) for r in responses] for name in SCHEMA.names}
    for name in IDS:
        columns[name] = list_column(columns[name])
    for name in NUMBERS:
        columns[name] = pa.array(columns[name], SCHEMA.field(name).type)
    columns["sampling"] = [None if r.sampling is None else _written(r.sampling) for r in responses]
    columns["spans"] = [[end for span in r.spans for end in span] for r in responses]
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def _lines_of(responses: Sequence[Response], batch: pa.RecordBatch) -> Iterator[str]:
    """The lines of `limbeck.rollouts.io.write_responses`, with the ids written by Arrow: they are nearly all of it."""
    prompts, answers = (_joined(batch.column(name)) for name in IDS)
    for response, prompt_ids, response_ids in zip(responses, prompts, answers, strict=True):
        row = fields_of(response)
        before = {name: row.pop(name) for name in ("prompt_id", "author")}
        after = {name: value for name, value in row.items() if name not in IDS}
        yield (
            f'{_JSON.encode(before)[:-1]}, "prompt_ids": [{prompt_ids}], '
            f'"response_ids": [{response_ids}], {_JSON.encode(after)[1:]}\n'
        )


def _joined(ids: pa.ListArray) -> Iterator[str]:
    texts = compute.call_function("binary_join", [ids.cast(pa.list_(pa.string())), ", "])
    return iter(texts.to_pylist())


@lru_cache(maxsize=64)
def _written(sampling: Sampling) -> str:
    return _JSON.encode(sampling_fields(sampling))


@lru_cache(maxsize=64)
def _read(written: str) -> Sampling:
    return sampling_from_json(json.loads(written))


def _named(batch: pa.RecordBatch) -> Iterator[tuple[str, Any]]:
    return zip(SCHEMA.names, batch.columns, strict=True)


def _as_field(name: str, value: Any) -> Any:
    """A value of a column as `Response` has it."""
    if name == "spans":
        return tuple(zip(value[::2], value[1::2], strict=True))
    if name == "sampling":
        return None if value is None else _read(value)
    return tuple(value) if isinstance(value, list) else value
