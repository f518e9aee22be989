"""Hidden states on disk: exact, found by the ids of responses, refused where they belong to other responses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limbeck.models.heads import head_of
from limbeck.objectives.sparse import SparseForm, sparse_columns
from limbeck.rollouts.collate import collate
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.stored import StoredTeacher, read_head, sparse_rows, write_head, write_shard, write_signal
from limbeck.types import DenseSignal, Head, LimbeckError, Response, SampledSignal, TopKSignal
from tests.training.play import HEAD_ROWS, VOCAB, tiny_model, tiny_responses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    model = tiny_model(3, tied=False)
    return LocalTeacher(model, head_of(model, VOCAB))


def judged(teacher: LocalTeacher, responses: list[Response], row: int) -> DenseSignal:
    return teacher.signal(collate(responses, [row], pad_id=0))


def store(folder: Path, teacher: LocalTeacher, responses: list[Response], *, dtype=torch.float32) -> None:
    """Two shards."""
    write_head(folder, teacher.head)
    for shard, rows in enumerate((range(0, 9), range(9, len(responses)))):
        hidden = {responses[row].id: judged(teacher, responses, row).hidden_ND for row in rows}
        write_shard(folder / f"{shard:05d}.safetensors", hidden, dtype=dtype)


def opened(folder: Path) -> StoredTeacher:
    return StoredTeacher.open(folder, device=CPU)


def test_what_was_written_is_read_exactly(tmp_path, teacher):
    responses = tiny_responses()
    store(tmp_path, teacher, responses)
    # The list of training holds every other response of the disk, backwards.
    chosen = list(range(len(responses)))[::-2]
    stored = opened(tmp_path)
    signal = stored.signal(collate([responses[row] for row in chosen], [4, 0, 7], pad_id=0))
    assert isinstance(signal, DenseSignal)
    expected = [judged(teacher, responses, chosen[row]).hidden_ND for row in (4, 0, 7)]
    assert torch.equal(signal.hidden_ND, torch.cat(expected))
    assert torch.equal(signal.head.weight_VD, teacher.head.weight_VD[:VOCAB])
    assert signal.head.vocab_size == VOCAB and len(teacher.head.weight_VD) == HEAD_ROWS


def test_half_precision_comes_back_in_the_heads_precision(tmp_path, teacher):
    responses = tiny_responses(12)
    store(tmp_path, teacher, responses, dtype=torch.bfloat16)
    signal = opened(tmp_path).signal(collate([responses[3]], [0], pad_id=0))
    assert isinstance(signal, DenseSignal)
    expected = judged(teacher, responses, 3).hidden_ND
    assert signal.hidden_ND.dtype == torch.float32
    assert torch.equal(signal.hidden_ND, expected.bfloat16().float())


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, HEAD_ROWS)])
def test_the_head_comes_back_without_its_padding(tmp_path, bias):
    head = Head(weight_VD=torch.randn(HEAD_ROWS, 8), bias_V=bias, scale=0.25, softcap=30.0, vocab_size=VOCAB)
    write_head(tmp_path, head)
    read = read_head(tmp_path)
    assert torch.equal(read.weight_VD, head.weight_VD[:VOCAB])
    assert (read.scale, read.softcap, read.vocab_size) == (0.25, 30.0, VOCAB)
    assert (read.bias_V is None) == (bias is None)
    if read.bias_V is not None and bias is not None:
        assert torch.equal(read.bias_V, bias[:VOCAB])


def test_a_row_that_is_not_there_is_named(tmp_path, teacher):
    responses = tiny_responses(12)
    store(tmp_path, teacher, responses)
    other = replace(responses[0], round=7)
    with pytest.raises(LimbeckError, match=rf"no signal for response {other.id}; delete it and run the same command"):
        opened(tmp_path).signal(collate([other], [0], pad_id=0))


def test_hidden_states_of_other_responses_are_refused(tmp_path, teacher):
    responses = tiny_responses(12)
    store(tmp_path, teacher, responses)
    longer = replace(responses[0], response_ids=(*responses[0].response_ids, 5))
    with pytest.raises(LimbeckError, match="made from other responses") as error:
        opened(tmp_path).signal(collate([longer], [0], pad_id=0))
    assert "\n" not in str(error.value)


def test_rows_of_the_wrong_lengths_are_refused_even_where_their_sum_fits(tmp_path, teacher):
    responses = tiny_responses(12)
    store(tmp_path, teacher, responses)
    one, two = next(
        (i, j) for i in range(12) for j in range(12) if len(responses[i].response_ids) < len(responses[j].response_ids)
    )
    # The ids are exchanged, so that each gets the other's states.
    swapped = [replace(responses[i], prompt_id=responses[j].prompt_id) for i, j in ((one, two), (two, one))]
    with pytest.raises(LimbeckError, match="made from other responses"):
        opened(tmp_path).signal(collate(swapped, [0, 1], pad_id=0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_that_is_not_finite_is_refused_and_nothing_written(tmp_path, bad):
    hidden_TD = torch.ones(3, 4)
    hidden_TD[1, 2] = bad
    with pytest.raises(LimbeckError, match=r"not finite on response 8{16}.*float32"):
        write_shard(
            tmp_path / "00000.safetensors", {"7" * 16: torch.ones(2, 4), "8" * 16: hidden_TD}, dtype=torch.float32
        )
    assert not list(tmp_path.iterdir())


def test_states_that_overflow_the_stored_precision_are_refused(tmp_path):
    with pytest.raises(LimbeckError, match=r"teacher\.cache_dtype"):
        write_shard(tmp_path / "00000.safetensors", {"0" * 16: torch.full((2, 4), 1e6)}, dtype=torch.float16)


def test_a_partial_shard_is_not_read(tmp_path, teacher):
    responses = tiny_responses(12)
    store(tmp_path, teacher, responses)
    (tmp_path / ".00002.safetensors.partial").write_bytes(b"half")
    assert len(opened(tmp_path).shards) == 12


@pytest.mark.parametrize("support", ["topk_tail", "sampled"])
def test_sparse_signals_are_read_exactly(tmp_path, teacher, support):
    responses, form = tiny_responses(6), SparseForm(support=support, k=5, temperatures=(1.0, 2.0))
    write_head(tmp_path, teacher.head)
    signals = {row: form.of(judged(teacher, responses, row), seed=row) for row in range(6)}
    write_signal(
        tmp_path / "00000.safetensors", sparse_rows({responses[row].id: signal for row, signal in signals.items()})
    )
    stored = StoredTeacher.open(tmp_path, device=CPU, temperatures=form.temperatures)
    got = stored.signal(collate(responses, [4, 1], pad_id=0))
    assert isinstance(got, TopKSignal | SampledSignal) and type(got) is type(signals[4])
    assert got.temperatures == (1.0, 2.0)
    for name in sparse_columns(type(signals[4])):
        joined = torch.cat([getattr(signals[row], name) for row in (4, 1)])
        assert torch.equal(getattr(got, name), joined), name
