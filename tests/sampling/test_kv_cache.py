"""The cache loses finished rows without disturbing the others."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.sampling.kv_cache import DecodeCache, order_without
from tests.sampling.tiny import config_of


@given(st.lists(st.booleans(), max_size=12))
def test_order_keeps_exactly_the_remaining_rows_and_moves_as_few_as_possible(finished: list[bool]) -> None:
    order = order_without(finished)
    assert sorted(order) == [row for row, done in enumerate(finished) if not done]
    holes = sum(finished[: len(order)])
    assert sum(target != source for target, source in enumerate(order)) == holes


def test_update_returns_what_was_written_for_the_rows_and_slots_looked_at() -> None:
    cache = DecodeCache(config_of("llama"), rows=3, capacity=6)
    states = torch.randn(3, 2, 4, 8)
    cache.look_at(0, 2, start=1, length=0)
    keys, _ = cache.update(states[:2, :, :3], states[:2, :, :3], 0)
    assert torch.equal(keys, states[:2, :, :3])
    cache.look_at(2, 1, start=0, length=0)
    cache.update(states[2:], states[2:], 0)
    cache.look_at(0, 3, start=0, length=4)
    step = torch.randn(3, 2, 1, 8)
    keys, values = cache.update(step, step, 0)
    padded = torch.cat([torch.zeros(2, 2, 1, 8), states[:2, :, :3]], dim=2)
    assert torch.equal(keys, torch.cat([torch.cat([padded, states[2:]]), step], dim=2))
    assert torch.equal(keys, values)
    cache.advance(1)
    assert cache.get_seq_length() == 5
    cache.keep([2, 1])
    step = torch.randn(2, 2, 1, 8)
    kept, _ = cache.update(step, step, 0)
    assert torch.equal(kept[:, :, :5], keys[[2, 1]])


def test_the_buffer_never_grows_and_is_never_copied_by_a_step() -> None:
    cache = DecodeCache(config_of("llama"), rows=2, capacity=9)
    state = torch.randn(2, 2, 1, 8)
    addresses = set()
    for _ in range(9):
        keys, _ = cache.update(state, state, 1)
        cache.advance(1)
        addresses.add(keys.data_ptr())
    assert len(addresses) == 1
