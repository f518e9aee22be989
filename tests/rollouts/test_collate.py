"""The plan of the data and the tensors made of it."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.rollouts.collate import collate, cut_by_rows, cut_by_tokens, micro_batches, turns
from limbeck.rollouts.order import Plan
from limbeck.types import Response

IDS = st.lists(st.integers(1, 50), min_size=1, max_size=9).map(tuple)


def response(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Response:
    return Response(prompt_id="p", author="data", prompt_ids=prompt_ids, response_ids=response_ids, stop="eos")


RESPONSES = st.lists(st.builds(response, IDS, IDS), min_size=1, max_size=60)


@given(RESPONSES, st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_an_epoch_holds_every_row_once_in_full_steps(responses, step_rows, seed, epoch):
    plan = Plan.of(responses, step_rows=step_rows, seed=seed)
    steps = plan.epoch(epoch)
    assert sorted(row for rows in steps for row in rows) == list(range(len(responses)))
    assert len(steps) == plan.steps_per_epoch
    assert sum(len(rows) != step_rows for rows in steps) <= 1
    assert all(
        [responses[row].length for row in rows] == sorted((responses[row].length for row in rows), reverse=True)
        for rows in steps
    )
    assert steps == Plan.of(responses, step_rows=step_rows, seed=seed).epoch(epoch)


@given(RESPONSES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_ranks_and_micro_batches_share_out_a_step(responses, rows_per_device, accumulation, ranks):
    plan = Plan.of(responses, step_rows=rows_per_device * accumulation * ranks, seed=0)
    for rows in plan.epoch(0):
        cut = [micro_batches(rows, rows_per_device=rows_per_device, rank=r, ranks=ranks) for r in range(ranks)]
        assert sorted(row for micros in cut for micro in micros for row in micro) == sorted(rows)
        assert len({len(micros) for micros in cut}) == 1, "ranks meet in every backward pass"
        assert all(len(micro) <= rows_per_device for micros in cut for micro in micros)
        assert len(cut[0]) <= accumulation


@given(RESPONSES, st.integers(1, 60), st.sampled_from([1, 2]), st.integers(1, 4))
def test_micro_batches_within_a_budget_of_tokens(responses, tokens, together, ranks):
    by_row = dict(enumerate(responses))
    chunks = cut_by_tokens(by_row, tokens, together=together, ranks=ranks)
    assert [row for chunk in chunks for row in chunk] == list(by_row)
    assert all(chunk[0] % together == 0 for chunk in chunks), "rows that belong together are not cut apart"
    for chunk in chunks:
        positions = max(by_row[row].length - 1 for row in chunk) * len(chunk)
        assert positions <= tokens or len(chunk) <= together
    assert len(chunks) % ranks == 0 or max(map(len, chunks)) <= together, "no rank waits where rows could be shared out"
    mine = [turns(chunks, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(micros) for micros in mine}) == 1
    assert sorted(row for micros in mine for micro in micros for row in micro) == list(by_row)


def test_a_budget_cuts_no_finer_than_it_must():
    by_row = dict(enumerate(response((1,) * 5, (2,) * (length - 5 + 1)) for length in (40, 30, 20, 20, 10, 10, 10)))
    assert cut_by_tokens(by_row, 60) == [(0,), (1, 2), (3, 4, 5), (6,)]
    # Without padding 20, 20, 10 and 10 are 60, not 80.
    assert cut_by_tokens(by_row, 60, packed=True) == [(0,), (1, 2), (3, 4, 5, 6)]
    assert cut_by_tokens(by_row, 10_000) == cut_by_rows(range(7), 7) == [tuple(range(7))]
    assert cut_by_tokens(by_row, 10_000, ranks=2) == [(0, 1, 2, 3), (4, 5, 6)]


@given(RESPONSES, st.integers(1, 9), st.integers(0, 12))
def test_the_steps_of_a_training_go_through_epoch_after_epoch(responses, step_rows, steps):
    plan = Plan.of(responses, step_rows=step_rows, seed=3)
    played = [plan.at(step) for step in range(steps)]
    assert played == [plan.epoch(i // plan.steps_per_epoch)[i % plan.steps_per_epoch] for i in range(steps)]


def realistic(count: int = 600) -> list[Response]:
    """Prompts of 30 to 120 tokens, answers log-normal with a tail and a cap at 256, as sampled data has them."""
    draw = random.Random(0)
    lengths = [(draw.randint(30, 120), min(256, max(1, round(draw.lognormvariate(4.2, 0.8))))) for _ in range(count)]
    return [response((1,) * prompt, (2,) * answer) for prompt, answer in lengths]


def padding(responses: list[Response], steps: list[tuple[int, ...]]) -> float:
    area = sum(max(responses[r].length for r in rows) * len(rows) for rows in steps)
    return 1 - sum(r.length for r in responses) / area


def test_padding_costs_next_to_nothing_on_realistic_lengths():
    responses = realistic()
    plan = Plan.of(responses, step_rows=8, seed=0)
    order = list(range(len(responses)))
    unsorted = [tuple(order[i : i + 8]) for i in range(0, len(order), 8)]
    assert padding(responses, plan.epoch(0)) < 0.04
    assert padding(responses, unsorted) > 0.3


def test_seed_and_epoch_change_the_order_and_long_steps_do_not_come_first():
    responses = realistic()
    orders = [Plan.of(responses, step_rows=8, seed=seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    longest = [max(responses[row].length for row in rows) for rows in orders[0]]
    early, late = longest[: len(longest) // 2], longest[len(longest) // 2 :]
    assert abs(sum(early) / len(early) - sum(late) / len(late)) < 30


@given(st.lists(st.builds(response, IDS, IDS), min_size=1, max_size=6), st.data())
def test_collate_equals_the_naive_construction(responses, data):
    rows = data.draw(st.permutations(range(len(responses))))
    batch = collate(responses, rows, pad_id=0)
    width = max(r.length for r in responses) - 1
    assert batch.input_ids_BT.shape == batch.attention_mask_BT.shape == batch.loss_mask_BT.shape == (len(rows), width)
    assert batch.rows == tuple(rows)
    labels: list[int] = []
    for i, row in enumerate(rows):
        every = responses[row].prompt_ids + responses[row].response_ids
        for t in range(width):
            real = t < len(every) - 1
            # Position t predicts token t + 1, and only tokens of the response count.
            predicts = real and t + 1 >= len(responses[row].prompt_ids)
            assert batch.input_ids_BT[i, t] == (every[t] if real else 0)
            assert batch.attention_mask_BT[i, t] == real
            assert batch.loss_mask_BT[i, t] == predicts
            if predicts:
                labels.append(every[t + 1])
    assert batch.labels_N.tolist() == labels
    assert batch.input_ids_BT.dtype == batch.attention_mask_BT.dtype == batch.labels_N.dtype == torch.int64
    assert batch.loss_mask_BT.dtype == torch.bool


def test_collate_takes_rows_by_number_from_a_mapping():
    responses = {7: response((1, 2), (3,)), 9: response((4,), (5, 6))}
    batch = collate(responses, [9, 7], pad_id=0)
    assert batch.labels_N.tolist() == [5, 6, 3]
    assert batch.input_ids_BT.tolist() == [[4, 5], [1, 2]]


def test_a_row_without_answer_adds_no_label():
    batch = collate([response((1, 2, 3), ()), response((4,), (5,))], [0, 1], pad_id=0)
    assert batch.labels_N.tolist() == [5]
    assert batch.loss_mask_BT.tolist() == [[False, False], [True, False]]
