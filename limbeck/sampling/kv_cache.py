"""A key-value cache that is allocated once, written in place and loses finished rows.

transformers' default cache is rebuilt by concatenation at every step and keeps every row to the end. Here each layer
owns one buffer of shape (rows, heads, capacity, head size). The rows of a batch end at the same slot (they are padded
on the left), so a step writes one slice and attention reads one view; when a row finishes, the last row moves into
its place.

Sliding-window layers keep their whole past: the model's own mask still hides what lies outside the window. Layers
that are not attention (recurrent states) keep the class transformers gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass
class Window:
    """The part of the buffers that a forward pass works on, shared by all layers.

    Attributes:
        first, rows: the range of rows.
        start: slot where the rows begin.
        length: tokens already held from `start` on.
    """

    first: int
    rows: int
    start: int
    length: int


class BufferLayer(CacheLayerMixin):
    """Keys and values of one attention layer in one allocation: (rows, heads, capacity, head size)."""

    is_sliding = False

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a slot that is masked weighs nothing, but a NaN there would survive its weight of 0.
        self.keys = key_states.new_zeros((self.rows, key_states.shape[1], self.capacity, key_states.shape[3]))
        self.values = value_states.new_zeros((self.rows, value_states.shape[1], self.capacity, value_states.shape[3]))
        self.is_initialized = True

    def get_max_length(self) -> int:
        return self.capacity


class PreallocatedLayer(BufferLayer):
    """A layer whose rows hold their tokens side by side, up to the same slot."""

    def __init__(self, rows: int, capacity: int, window: Window):
        BufferLayer.__init__(self, rows, capacity)
        self.window = window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new states behind the ones held and return a view of all of them: (rows, heads, T, head size)."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        window = self.window
        rows = slice(window.first, window.first + window.rows)
        begin = window.start + window.length
        end = begin + key_states.shape[2]
        self.keys[rows, :, begin:end] = key_states
        self.values[rows, :, begin:end] = value_states
        return self.keys[rows, :, window.start : end], self.values[rows, :, window.start : end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.length

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite one row by another."""
        if self.keys is None or self.values is None:
            return
        end = self.window.start + self.window.length
        self.keys[target, :, :end] = self.keys[source, :, :end]
        self.values[target, :, :end] = self.values[source, :, :end]


class DecodeCache(Cache):
    """The cache of one batch.

    Attributes:
        window: the rows and slots the next forward pass works on. `advance` must follow every pass.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, capacity: int):
        """`capacity` is the number of slots: the longest prompt and the new tokens."""
        self.window = Window(first=0, rows=rows, start=0, length=0)
        layers = [
            PreallocatedLayer(rows, capacity, self.window)
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
            else layer
            for layer in DynamicCache(config=config).layers
        ]
        Cache.__init__(self, layers=layers)
        self._others = [layer for layer in layers if not isinstance(layer, PreallocatedLayer)]
        self._attention = [layer for layer in layers if isinstance(layer, PreallocatedLayer)]

    @property
    def splits_rows(self) -> bool:
        """Whether a forward pass may work on some of the rows: only where every layer is ours."""
        return not self._others

    def look_at(self, first: int, rows: int, start: int, length: int) -> None:
        """Point the next forward pass at a range of rows that begin at slot `start` and hold `length` tokens."""
        self.window.first, self.window.rows, self.window.start, self.window.length = first, rows, start, length

    def advance(self, tokens: int) -> None:
        """Count the tokens that the last forward pass wrote."""
        self.window.length += tokens

    def keep(self, order: list[int]) -> None:
        """Drop rows: afterwards row i is what row `order[i]` was. Rows already in place cost nothing."""
        for target, source in enumerate(order):
            if target != source:
                for layer in self._attention:
                    layer.copy_row(source, target)
        self.window.rows = len(order)
        if self._others:
            index = torch.LongTensor(order)
            for layer in self._others:
                layer.reorder_cache(index)


def order_without(finished: list[bool]) -> list[int]:
    """Where the remaining rows come from: each hole is filled by a row from the end, everyone else stays."""
    remaining = finished.count(False)
    movers = [row for row in range(len(finished) - 1, remaining - 1, -1) if not finished[row]]
    return [movers.pop() if finished[row] else row for row in range(remaining)]
