"""Formats of adapters on 4-bit weights, which no GGUF file holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class Int4G32(BlockFormat):
    """4 bits, groups of 32 with scale and zero point, as GPTQ and AWQ keep them: ``w = s (q - z)``."""

    width = 32
    # The zero point has a byte of its own.
    block_bytes = 19

    def grid(self, weight_NB: Tensor) -> Grid:
        low = weight_NB.amin(-1, keepdim=True).clamp(max=0)
        high = weight_NB.amax(-1, keepdim=True).clamp(min=0)
        scale_N1 = half((high - low) / 15)
        return scale_N1, (-low * inverse(scale_N1)).round().clamp(0, 15)

    def levels(self, weight_NB: Tensor, grid: Grid) -> Tensor:
        return (weight_NB * inverse(grid[0])).round_().add_(grid[1]).clamp_(0, 15)

    def decode(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return (level_NB - grid[1]).mul_(grid[0])

    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return torch.cat([half_bytes(grid[0]), grid[1].to(torch.uint8), nibbles(level_NB)], dim=-1)

    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        return of_nibbles(block_NY[:, 3:]), (of_half_bytes(block_NY[:, :2]), block_NY[:, 2:3].to(torch.float32))


# Dettmers et al. 2023 (QLoRA), appendix E: quantiles of a normal distribution, with an exact 0.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(_NF4, device=device)


@cache
def _borders(device: torch.device) -> Tensor:
    """Half way between neighbours."""
    values = torch.tensor(_NF4, dtype=torch.float64)
    return ((values[1:] + values[:-1]) / 2).to(device, torch.float32)


@dataclass(frozen=True)
class Nf4(BlockFormat):
    """4 bits, blocks of 64, 16 quantiles of a normal distribution times the largest absolute value (QLoRA)."""

    width = 64
    block_bytes = 36

    def grid(self, weight_NB: Tensor) -> Grid:
        return (weight_NB.abs().amax(-1, keepdim=True),)

    def levels(self, weight_NB: Tensor, grid: Grid) -> Tensor:
        share_NB = weight_NB * inverse(grid[0])
        return torch.bucketize(share_NB, _borders(share_NB.device)).to(torch.float32)

    def decode(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return _values(level_NB.device)[level_NB.to(torch.int64)] * grid[0]

    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        return torch.cat([grid[0].contiguous().view(torch.uint8), nibbles(level_NB)], dim=-1)

    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        return of_nibbles(block_NY[:, 4:]), (block_NY[:, :4].contiguous().view(torch.float32),)
