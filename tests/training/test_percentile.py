"""The percentile of a step, from parts and over ranks, against the sorted list."""

import math

import pytest
import torch

from limbeck.training.percentile import StreamingPercentile


def nearest_rank(values, share):
    return sorted(values)[max(1, math.ceil(share * len(values) - 1e-9)) - 1]


@pytest.mark.parametrize("tokens", [1, 2, 50, 99, 100, 101, 1000, 1003, 4096])
@pytest.mark.parametrize("share", [0.99, 0.5, 0.9])
def test_parts_and_ranks_give_the_percentile_of_the_whole(tokens, share):
    torch.manual_seed(tokens)
    values = torch.randn(tokens).exp()
    expected = nearest_rank(values.tolist(), share)
    ranks = [StreamingPercentile(tokens, share=share) for _ in range(3)]
    for n, part in enumerate(values.split(37)):
        ranks[n % 2].add(part)  # the third rank has no rows
    largest_K = torch.cat([tail.largest_K for tail in ranks])
    assert all(tail.value(lambda _: largest_K).item() == expected for tail in ranks)
    alone = StreamingPercentile(tokens, share=share)
    alone.add(values.bfloat16().requires_grad_())
    assert alone.value().item() == nearest_rank(values.bfloat16().tolist(), share)
    assert len(alone.largest_K) <= tokens * (1 - share) + 1.001


def test_ties_and_too_few_values():
    tail = StreamingPercentile(1000)
    tail.add(torch.cat([torch.zeros(985), torch.full((15,), 3.0)]))
    assert tail.value() == 3.0 and not tail.value().requires_grad
    assert StreamingPercentile(1000).value() == -math.inf
