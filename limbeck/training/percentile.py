"""A high percentile of the values of a step's tokens, which come in parts and on several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class StreamingPercentile:
    """The percentile of the values of all tokens of a step, exact, keeping the largest K of them alone.

    It is the smallest value that `share` of the tokens do not exceed (nearest rank): with 1000 tokens and 99 %, the
    11th largest. ::

        tail = StreamingPercentile(tokens, device=device)  # tokens of the step, over all ranks
        for micro in micros: tail.add(value_N)      # any number of times, also never
        p99 = tail.value(accelerator.gather)        # or tail.value() with one process

    Args:
        tokens: values of the whole step, over all ranks and micro-batches; at least 1.
        share: of the tokens, below 1.
    """

    def __init__(self, tokens: int, *, share: float = 0.99, device: torch.device | str = "cpu"):
        # The guard against 1000 * 0.01 = 10.000000000000009.
        size = int(tokens * (1 - share) + 1e-6) + 1
        # The same size on each rank, so that one gather brings them together.
        self.largest_K = torch.full((size,), -torch.inf, device=device)

    def add(self, value_N: Tensor) -> None:
        """Take in values; nothing waits for the device."""
        both = torch.cat([self.largest_K, value_N.detach().float().flatten()])
        self.largest_K = both.topk(len(self.largest_K)).values

    def value(self, gather: Callable[[Tensor], Tensor] = lambda largest_K: largest_K) -> Tensor:
        """The percentile, a 0-d float32 tensor; minus infinity where fewer values came than were announced.

        Args:
            gather: concatenates the tensors (K,) of all ranks.
        """
        return gather(self.largest_K).topk(len(self.largest_K)).values[-1]
