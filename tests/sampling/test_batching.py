"""Batches that are left of a plan."""

from __future__ import annotations

from limbeck.sampling.batching import batches_left


def test_a_batch_with_one_that_is_left_is_sampled_whole() -> None:
    plan = [(3, 1), (0, 2), (4,)]
    # What is done is read once, however many batches there are: an iterator has nothing left for a second one.
    assert batches_left(plan, iter([1, 3, 0])) == [(0, 2), (4,)]
    assert batches_left(plan, []) == plan and batches_left(plan, range(5)) == []
