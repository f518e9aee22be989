"""Responses in columns: the same as in lines, and none of them in memory before it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.rollouts import table
from limbeck.rollouts.io import read_responses, write_responses
from limbeck.rollouts.order import Plan
from limbeck.rollouts.table import (
    ResponseTable,
    in_a_row,
    keep_columns,
    keep_responses,
    lengths_of,
    open_responses,
    prompts_of,
    without,
)
from limbeck.runtime import columns
from limbeck.types import LimbeckError, Response, Sampling

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
LOGP = st.none() | st.lists(st.floats(allow_nan=False), max_size=6).map(tuple)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SAMPLING = st.builds(
    Sampling, temperature=st.floats(0, 2), seed=st.integers(0, 2**64), stop=st.lists(TEXT, max_size=2).map(tuple)
)
RESPONSES = st.lists(
    st.builds(
        Response,
        prompt_id=TEXT,
        author=st.sampled_from(["data", "teacher", "student"]),
        prompt_ids=IDS,
        response_ids=IDS,
        stop=st.sampled_from(["eos", "stop", "length"]),
        sampling=st.none() | SAMPLING,
        split=st.sampled_from(["train", "heldout"]),
        logp=LOGP,
        sampled_logp=LOGP,
        replaced=st.none() | st.integers(0, 9),
        spans=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=2).map(tuple),
        round=st.integers(-1, 3),
        images=st.lists(TEXT, max_size=2).map(tuple),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("responses")


def some(count: int) -> list[Response]:
    return [
        Response(
            prompt_id=f"p{i}",
            author="teacher",
            prompt_ids=(1,) * (1 + i % 7),
            response_ids=tuple(range(i % 11)),
            stop="eos",
            split="heldout" if i % 5 == 0 else "train",
        )
        for i in range(count)
    ]


# Every example settles six files on the disk.
@settings(deadline=None, max_examples=30)
@given(RESPONSES, st.integers(1, 4))
def test_what_is_written_is_read_and_the_lines_are_those_of_json(folder, responses, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "ROWS", rows)
        patch.setattr(table, "AT_A_TIME", 2)
        patch.setattr(columns, "AT_A_TIME", 2)
        keep_responses(folder / "teacher.jsonl", responses)
        found = open_responses(folder / "teacher.jsonl")
        assert list(found) == responses == [found[row] for row in range(len(found))]
        assert list(found[::-2]) == responses[::-2]
        numbers = [row * 7 % len(found) for row in range(len(found))]
        assert found[::-1].several(numbers) == [responses[::-1][row] for row in numbers]
        assert [r.replaced for r in found] == [r.replaced for r in responses]
        assert lengths_of(found).tolist() == [r.length for r in responses]
        assert list(prompts_of(found)) == [r.prompt_id for r in responses]
        for split in ("train", "heldout"):
            wanted = {row: r for row, r in enumerate(responses) if r.split == split and r.response_ids}
            assert dict(found.answered(split)) == wanted
            assert list(in_a_row(found.answered(split))) == list(wanted.values())
    write_responses(folder / "naive.jsonl", responses)
    assert (folder / "teacher.jsonl").read_bytes() == (folder / "naive.jsonl").read_bytes()
    assert read_responses(folder / "teacher.jsonl") == responses


def test_the_same_responses_give_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        keep_responses(tmp_path / f"{name}.jsonl", some(3000))
    assert (tmp_path / "one.arrow").read_bytes() == (tmp_path / "other.arrow").read_bytes()
    # Written over while it is open: those who read go on with what they opened.
    opened = open_responses(tmp_path / "one.jsonl")
    keep_responses(tmp_path / "one.jsonl", some(5))
    assert opened[2999] == some(3000)[2999] and len(open_responses(tmp_path / "one.jsonl")) == 5


def test_columns_alone_are_those_beside_the_lines(tmp_path):
    keep_responses(tmp_path / "both.jsonl", some(5000))
    keep_columns(tmp_path / "alone.arrow", iter(some(5000)))
    assert list(open_responses(tmp_path / "alone.jsonl")) == list(open_responses(tmp_path / "both.jsonl"))
    assert [batch.num_rows for batch in open_responses(tmp_path / "alone.jsonl").batches] == [4096, 904]


def test_parts_of_a_file_keep_their_places(tmp_path):
    responses = some(2500)
    keep_responses(tmp_path / "teacher.jsonl", responses)
    train = open_responses(tmp_path / "teacher.jsonl").answered("train")
    naive = {row: r for row, r in enumerate(responses) if r.split == "train" and r.response_ids}
    left = [row for row in naive if row % 3 == 0]
    assert dict(without(train, left)) == without(naive, left) == {r: naive[r] for r in naive if r % 3}
    assert 5 not in train and 6 in train and 2500 not in train and -1 not in train
    with pytest.raises(KeyError):
        train[5]
    assert list(in_a_row(train)[3:9:2]) == list(naive.values())[3:9:2]
    one, other = (Plan.of(source, step_rows=16, seed=4) for source in (in_a_row(train), list(naive.values())))
    assert one.epoch(3) == other.epoch(3)


def naive_epoch(lengths: list[int], step_rows: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The line of `Plan` with Python's own numbers and sort."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    steps: list[tuple[int, ...]] = []
    for start in range(0, len(order), 32 * step_rows):
        block = sorted(order[start : start + 32 * step_rows], key=lambda row: -lengths[row])
        steps += [tuple(block[i : i + step_rows]) for i in range(0, len(block), step_rows)]
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=400), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_the_order_is_that_of_a_stable_sort(lengths, step_rows, seed, epoch):
    plan = Plan(lengths=tuple(lengths), step_rows=step_rows, seed=seed)
    assert plan.epoch(epoch) == naive_epoch(lengths, step_rows, seed, epoch)


def test_a_run_of_an_earlier_version_is_read_from_its_lines(tmp_path):
    write_responses(tmp_path / "teacher.jsonl", some(1500))
    assert list(open_responses(tmp_path / "teacher.jsonl")) == some(1500)


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    keep_responses(tmp_path / "teacher.jsonl", some(1500))
    path = tmp_path / "teacher.arrow"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\0" * len(whole), whole[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(LimbeckError, match=r"teacher\.arrow is damaged .*; delete .*run the same command again$"):
            open_responses(tmp_path / "teacher.jsonl")
    path.unlink()
    (tmp_path / "teacher.jsonl").unlink()
    with pytest.raises(OSError):
        open_responses(tmp_path / "teacher.jsonl")


def test_nothing_is_made_before_it_is_asked_for(tmp_path, monkeypatch):
    keep_responses(tmp_path / "teacher.jsonl", some(3000))
    made: list[int] = []
    naive = ResponseTable.made_of
    monkeypatch.setattr(ResponseTable, "made_of", lambda self, some: made.append(some.num_rows) or naive(self, some))
    train = in_a_row(open_responses(tmp_path / "teacher.jsonl").answered("train"))
    plan = Plan.of(train, step_rows=8, seed=0)
    assert len(train) > 2000 and made == []
    assert [train[row].length for row in plan.at(0)] == [int(lengths_of(train)[row]) for row in plan.at(0)]
    assert made == [1] * 8
