"""Responses written before training, in the order of the plan."""

from __future__ import annotations

import pytest

from limbeck.rollouts.sources import OfflineSource, SourceContext, offline
from limbeck.types import LimbeckError
from tests.sampling.writing import base_of, played, prompts_of

SHIFT = SourceContext(step_rows=4, seed=11)
# Ten prompts in steps of four rows: an epoch is three steps, the last of two rows in whatever place it has.
TOTAL = 9


def test_fixed_responses_come_in_the_order_of_the_plan_under_their_own_numbers():
    base = base_of(prompts_of(10))
    response_source = offline(base)(SHIFT)
    assert (response_source.steps_per_epoch, response_source.prompts) == (3, {r.prompt_id for r in base})
    for epoch in range(2):
        steps = played(response_source, range(3 * epoch, 3 * epoch + 3), TOTAL)
        assert sorted(row for step in steps for row in step) == list(range(10))
        assert all(step[row] is base[row] for step in steps for row in step)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(LimbeckError, match="no responses to train on"):
        OfflineSource([], SHIFT)
