"""The k likeliest tokens against a stable sort of whole rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluation.token_metrics.likeliest import WIDTH, group_maxima, likeliest


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5 * WIDTH), st.integers(1, 12), st.integers(0, 2**16), st.sampled_from([3, 40, 10**6]))
def test_equal_to_a_stable_sort_with_ties_or_without(V, k, seed, levels):
    k = min(k, V)
    logits_NV = torch.randint(levels, (7, V), generator=torch.Generator().manual_seed(seed)) / levels
    expected_NK = logits_NV.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert likeliest(logits_NV, group_maxima(logits_NV), k).equal(expected_NK)


@pytest.mark.parametrize("V", [1, WIDTH - 1, WIDTH, WIDTH + 1, 3 * WIDTH])
def test_maxima_are_of_neighbouring_ids(V):
    logits_NV = torch.randn(3, V)
    expected = [part.amax(1) for part in logits_NV.split(WIDTH, dim=1)]
    assert group_maxima(logits_NV).equal(torch.stack(expected, dim=1))
