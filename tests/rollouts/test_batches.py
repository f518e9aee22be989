"""Responses in the files of batches: in one row, as they were written, one in memory at a time."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from limbeck.rollouts.batches import BatchedResponses, InterleavedResponses
from limbeck.rollouts.io import read_batch, write_batch
from limbeck.types import LimbeckError, Response


def response(number: int, ids: int = 3) -> Response:
    return Response(
        prompt_id=f"ä{number}",
        author="teacher",
        stop="length",
        prompt_ids=(5, number),
        response_ids=tuple(range(number, number + ids)),
    )


def written(folder: Path, count: int, ids: int = 3) -> dict[Path, list[int]]:
    """Batches of up to 7 of them, in any order, as a sampler makes them of rows of similar length."""
    places = list(range(count))
    random.Random(0).shuffle(places)
    batches = {folder / f"{start:05d}.jsonl": places[start : start + 7] for start in range(0, count, 7)}
    for path, some in batches.items():
        write_batch(path, [response(place, ids) for place in some])
    return batches


def test_they_come_in_the_order_of_their_places(tmp_path: Path) -> None:
    responses = BatchedResponses(written(tmp_path, 40))
    assert list(responses) == [response(number) for number in range(40)]
    assert len(responses) == 40 and responses[-1] == response(39)
    assert responses[5:9] == [response(number) for number in range(5, 9)]
    with pytest.raises(IndexError):
        responses[40]


def test_rows_of_several_come_in_one(tmp_path: Path) -> None:
    places = [[3, 0, 7], [1, 2], [], [6, 5, 4]]
    rows = InterleavedResponses([([response(place) for place in some], some) for some in places])
    assert list(rows) == [response(number) for number in range(8)]
    assert rows[-1] == response(7) and rows[2:5] == [response(number) for number in (2, 3, 4)]


def test_none() -> None:
    assert list(BatchedResponses({})) == []


def test_a_file_with_another_number_of_them_is_refused_at_once(tmp_path: Path) -> None:
    batches = written(tmp_path, 14)
    path = next(iter(batches))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(LimbeckError, match=r"00000.jsonl is damaged \(it holds 5 responses of 7\); delete "):
        BatchedResponses(batches)


def test_a_digit_that_was_changed_is_noticed(tmp_path: Path) -> None:
    batches = written(tmp_path, 14)
    path, places = list(batches.items())[1]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"[5, ", b"[6, ", 1))
    for read in (lambda: BatchedResponses(batches), lambda: read_batch(path, len(places))):
        with pytest.raises(LimbeckError) as caught:
            read()
        assert str(caught.value) == (
            f"{path} is damaged (its sha256 is not that in 00007.jsonl.sha256); delete {path} and run the same command "
            "again"
        )
    path.unlink()
    write_batch(path, [response(place) for place in places])
    assert path.read_bytes() == whole and read_batch(path, len(places)) and len(BatchedResponses(batches)) == 14


def test_batches_of_older_runs_have_no_checksums(tmp_path: Path) -> None:
    batches = written(tmp_path, 14)
    for path in batches:
        assert path.with_name(f"{path.name}.sha256").read_text().split()[1] == path.name
        path.with_name(f"{path.name}.sha256").unlink()
    assert list(BatchedResponses(batches)) == [response(number) for number in range(14)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    batches = written(tmp_path, 14)
    path, places = next(iter(batches.items()))
    path.with_name(f"{path.name}.sha256").unlink()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"prompt_id": 1}\n', *lines[4:]]))
    responses = BatchedResponses(batches)
    with pytest.raises(LimbeckError, match=r"00000.jsonl:4 is damaged"):
        responses[places[3]]


def test_memory_does_not_grow_with_their_length(tmp_path: Path) -> None:
    batches = written(tmp_path, 700, ids=2000)
    tracemalloc.start()
    try:
        assert sum(len(r.response_ids) for r in BatchedResponses(batches)) == 700 * 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All of them are 11 MB as tuples alone; one with what its line is read from is 0.2.
    assert peak < 1_000_000
