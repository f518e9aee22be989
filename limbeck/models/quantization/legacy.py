"""The formats of llama.cpp with blocks of 32 and one scale: round to nearest, as its own converter writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.models.quantization.base import (
    BlockFormat,
    Grid,
    half,
    half_bytes,
    inverse,
    nibbles,
    of_half_bytes,
    of_nibbles,
)


def _signed_extreme(weight_NB: Tensor) -> Tensor:
    """The weight of each block that is farthest from 0, the first of several, with its sign."""
    place_N1 = weight_NB.abs().argmax(dim=-1, keepdim=True)
    return weight_NB.gather(-1, place_N1)


class _OneScale(BlockFormat):
    """Levels around a middle one, ``w = d (q - middle)``; d puts the weight farthest from 0 at level 0."""

    middle: ClassVar[int]

    def grid(self, weight_NB: Tensor) -> Grid:
        scale_N1 = _signed_extreme(weight_NB) / -self.middle
        # The levels are taken with the scale as it was before it was rounded to float16.
        return inverse(scale_N1), half(scale_N1)

    def candidates(self, weight_NB: Tensor, importance_NB: Tensor) -> Iterator[Grid]:
        """The plain grid, and scales around it: each the best one for the levels that a first guess gives.

        As llama.cpp's search with an importance matrix (make_qx_quants): clipping the largest weight can pay.
        """
        plain = self.grid(weight_NB)
        yield plain
        extreme_N1 = _signed_extreme(weight_NB)
        for step in range(-9, 10):
            guess_N1 = extreme_N1 / -(self.middle + 0.1 * step)
            level_NB = self.levels(weight_NB, (inverse(guess_N1), guess_N1)) - self.middle
            along_N1 = (importance_NB * weight_NB * level_NB).sum(-1, keepdim=True)
            scale_N1 = half(along_N1 * inverse((importance_NB * level_NB * level_NB).sum(-1, keepdim=True)))
            yield inverse(scale_N1), scale_N1

    def levels(self, weight_NB: Tensor, grid: Grid) -> Tensor:
        return (weight_NB * grid[0]).add_(self.middle + 0.5).trunc_().clamp_(0, 2 * self.middle - 1)

    def decode(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return (level_NB - self.middle).mul_(grid[1])


@dataclass(frozen=True)
class Q4_0(_OneScale):
    """4 bits, blocks of 32: ``w = d (q - 8)``."""

    width = 32
    middle = 8
    block_bytes = 18
    gguf = "Q4_0"
    replacement = "q8_0"

    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return torch.cat([half_bytes(grid[1]), nibbles(level_NB)], dim=-1)

    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        scale_N1 = of_half_bytes(block_NY[:, :2])
        return of_nibbles(block_NY[:, 2:]), (inverse(scale_N1), scale_N1)


@dataclass(frozen=True)
class Q5_0(_OneScale):
    """5 bits, blocks of 32: ``w = d (q - 16)``; what llama.cpp takes where rows are no multiple of q4_k's 256."""

    width = 32
    middle = 16
    block_bytes = 22
    gguf = "Q5_0"
    replacement = "q8_0"

    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        level = level_NB.to(torch.uint8)
        # The fifth bit of weight i is bit i of four bytes, the lowest first.
        place_8 = torch.arange(8, dtype=torch.uint8, device=level.device)
        high = ((level >> 4).unflatten(-1, (4, 8)) << place_8).sum(-1, dtype=torch.uint8)
        return torch.cat([half_bytes(grid[1]), high, nibbles(level & 15)], dim=-1)

    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        scale_N1 = of_half_bytes(block_NY[:, :2])
        place_8 = torch.arange(8, dtype=torch.uint8, device=block_NY.device)
        high = ((block_NY[:, 2:6, None] >> place_8) & 1).flatten(1)
        return of_nibbles(block_NY[:, 6:]) + 16 * high, (inverse(scale_N1), scale_N1)


@dataclass(frozen=True)
class Q8_0(BlockFormat):
    """8 bits, blocks of 32: ``w = d q`` with q from -127 to 127."""

    width = 32
    block_bytes = 34
    gguf = "Q8_0"

    def grid(self, weight_NB: Tensor) -> Grid:
        scale_N1 = weight_NB.abs().amax(dim=-1, keepdim=True) / 127
        return inverse(scale_N1), half(scale_N1)

    def levels(self, weight_NB: Tensor, grid: Grid) -> Tensor:
        scaled_NB = weight_NB * grid[0]
        size_NB = scaled_NB.abs()
        whole_NB = size_NB.floor()
        # Halves away from 0, unlike torch.round.
        whole_NB += (size_NB.sub_(whole_NB)) >= 0.5
        return whole_NB.clamp_(max=127).copysign_(scaled_NB)

    def decode(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return level_NB * grid[1]

    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return torch.cat([half_bytes(grid[1]), level_NB.to(torch.int8).view(torch.uint8)], dim=-1)

    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        scale_N1 = of_half_bytes(block_NY[:, :2])
        return block_NY[:, 2:].contiguous().view(torch.int8).to(torch.float32), (inverse(scale_N1), scale_N1)
