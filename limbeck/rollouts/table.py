"""Responses as columns of an Arrow file that is mapped into memory, so that a rank holds the rows it is at and not all.

    responses/teacher.jsonl   for people and other tools: one JSON object per line
    responses/teacher.arrow   the same for training: ids as int32, opened in no time whatever their number

Both are written together. Where the second one is missing, as in runs of earlier versions, the first one is read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from pyarrow import compute

from limbeck.rollouts.io import fields_of, read_responses, sampling_fields, sampling_from_json
from limbeck.runtime.files import whole_file
from limbeck.types import LimbeckError, Response, Sampling, Split

# Rows of a record batch; all but the last have as many, so that a row is found by division.
ROWS = 4096
# Rows that become text, or Python's own objects, at a time.
_AT_A_TIME = 256
IDS = ("prompt_ids", "response_ids")
NUMBERS = ("logp", "sampled_logp")
_JSON = json.JSONEncoder(ensure_ascii=False)

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("author", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("stop", pa.string()),
        ("sampling", pa.string()),
        ("split", pa.string()),
        ("logp", pa.list_(pa.float64())),
        ("sampled_logp", pa.list_(pa.float64())),
        ("replaced", pa.int64()),
        ("spans", pa.list_(pa.int32())),
        ("round", pa.int64()),
        ("images", pa.list_(pa.string())),
    ]
)


class ResponseTable(Sequence[Response]):
    """Responses that are made when they are asked for.

    Args:
        batches: all rows of a file.
        places: those that belong to the sequence, in its order.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], places: np.ndarray | None = None):
        self._batches = batches
        self._rows = batches[0].num_rows if batches else 1
        count = sum(batch.num_rows for batch in batches)
        self.places = np.arange(count, dtype=np.int32) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Response: ...
    @overload
    def __getitem__(self, index: slice) -> ResponseTable: ...
    def __getitem__(self, index: int | slice) -> Response | ResponseTable:
        if isinstance(index, slice):
            return ResponseTable(self._batches, self.places[index])
        return self.at(int(self.places[index]))

    def __iter__(self) -> Iterator[Response]:
        for start in range(0, len(self), _AT_A_TIME):
            numbers, rows = np.divmod(self.places[start : start + _AT_A_TIME], self._rows)
            # Places of a split lie in few batches, one behind the other.
            ends = (np.flatnonzero(np.diff(numbers)) + 1).tolist()
            for begin, end in pairwise([0, *ends, len(rows)]):
                yield from _responses(self._batches[int(numbers[begin])], rows[begin:end])

    def at(self, place: int) -> Response:
        """The response at a place of the file."""
        number, row = divmod(place, self._rows)
        return _response(self._batches[number], row)

    def taken(self, places: np.ndarray) -> ResponseTable:
        """The responses at some places of the file."""
        return ResponseTable(self._batches, places.astype(np.int32))

    def followed_by(self, others: ResponseTable) -> ResponseTable:
        """These responses and others of the same file."""
        return self.taken(np.concatenate([self.places, others.places]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """`Response.length` of each."""
        return self.answer_lengths + self._of_all("prompt_ids")

    @property
    def answer_lengths(self) -> np.ndarray:
        """Ids of each response."""
        return self._of_all("response_ids")

    def _of_all(self, name: str) -> np.ndarray:
        found = [_lengths(batch, name) for batch in self._batches]
        return np.concatenate([*found, np.empty(0, np.int32)])[self.places]

    @property
    def prompt_ids(self) -> Iterator[str]:
        """`Response.prompt_id` of each."""
        return self._column("prompt_id")

    def _column(self, name: str) -> Iterator[Any]:
        for place in self.places.tolist():
            number, row = divmod(place, self._rows)
            yield self._batches[number].column(name)[row].as_py()

    def answered(self, split: Split) -> NumberedResponses:
        """The responses of a split that have ids, by their place in the file."""
        kept = []
        for batch in self._batches:
            of_split = compute.call_function("equal", [batch.column("split"), split]).to_numpy(zero_copy_only=False)
            kept.append(of_split & (_lengths(batch, "response_ids") > 0))
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


def keep_columns(path: Path, responses: Sequence[Response]) -> None:
    """Write responses for training alone (`path`, .arrow), whole or not at all."""
    with _columns(path) as writer:
        for start in range(0, len(responses), ROWS):
            writer.write_batch(_batch_of(responses[start : start + ROWS]))


def keep_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write responses for people (`path`, .jsonl) and for training (.arrow beside it), each whole or not at all."""
    source = iter(responses)
    with (
        whole_file(path) as lines,
        lines.open("w", encoding="utf-8", newline="\n") as file,
        _columns(path.with_suffix(".arrow")) as writer,
    ):
        while some := list(islice(source, ROWS)):
            batch = _batch_of(some)
            writer.write_batch(batch)
            # As text a batch takes ten times its room.
            for start in range(0, len(some), _AT_A_TIME):
                file.writelines(_lines_of(some[start : start + _AT_A_TIME], batch.slice(start, _AT_A_TIME)))


@contextmanager
def _columns(path: Path) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """A file of columns that is written batch by batch, whole or not at all."""
    with whole_file(path) as columns, pa.OSFile(str(columns), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        yield writer


def open_responses(path: Path) -> ResponseTable:
    """The responses of `keep_responses` or `keep_columns`.

    Raises:
        LimbeckError: a damaged file.
    """
    columns = path.with_suffix(".arrow")
    if not columns.exists():
        every = read_responses(path)
        return ResponseTable([_batch_of(every[i : i + ROWS]) for i in range(0, len(every), ROWS)])
    try:
        with pa.memory_map(str(columns)) as source:
            file = pa.ipc.open_file(source)
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
            for batch in batches:
                batch.validate()
            if not file.schema.equals(SCHEMA) or len({batch.num_rows for batch in batches[:-1]}) > 1:
                raise pa.ArrowInvalid("its columns are not those of responses")
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise LimbeckError(
            f"{columns} is damaged ({reason}); delete {columns} and run the same command again"
        ) from None
    return ResponseTable(batches)


def _batch_of(responses: Sequence[Response]) -> pa.RecordBatch:
    columns: dict[str, Any] = {name: [getattr(r, name) for r in responses] for name in SCHEMA.names}
    for name in IDS:
        columns[name] = _ids(columns[name])
    for name in NUMBERS:
        columns[name] = pa.array(columns[name], SCHEMA.field(name).type)
    columns["sampling"] = [None if r.sampling is None else _written(r.sampling) for r in responses]
    columns["spans"] = [[end for span in r.spans for end in span] for r in responses]
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def _ids(rows: Sequence[Sequence[int]]) -> pa.ListArray:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    ids = np.fromiter(chain.from_iterable(rows), np.int32, int(ends[-1]))
    return pa.ListArray.from_arrays(ends, ids)


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


def _lengths(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return np.diff(batch.column(name).offsets.to_numpy())


def _responses(batch: pa.RecordBatch, rows: np.ndarray) -> Iterator[Response]:
    """Some rows of a batch, all columns of each at once."""
    some = batch.take(pa.array(rows))
    columns = [_ids_in(some.column(name)) if name in IDS else some.column(name).to_pylist() for name in SCHEMA.names]
    for values in zip(*columns, strict=True):
        yield Response(**{name: _as_field(name, value) for name, value in zip(SCHEMA.names, values, strict=True)})


def _ids_in(column: pa.ListArray) -> Iterator[tuple[int, ...]]:
    ids = column.values.to_numpy()
    return (tuple(ids[start:end].tolist()) for start, end in pairwise(column.offsets.to_pylist()))


def _response(batch: pa.RecordBatch, row: int) -> Response:
    plain: dict[str, Any] = {}
    for name, column in zip(SCHEMA.names, batch.columns, strict=True):
        value = column[row]
        found = tuple(value.values.to_numpy().tolist()) if name in IDS else value.as_py()
        plain[name] = _as_field(name, found)
    return Response(**plain)


def _as_field(name: str, value: Any) -> Any:
    """A value of a column as `Response` has it."""
    if name == "spans":
        return tuple(zip(value[::2], value[1::2], strict=True))
    if name == "sampling":
        return None if value is None else _read(value)
    return tuple(value) if isinstance(value, list) else value
