"""The registry of block formats. To add one: write the dataclass, add its line to `FORMATS`."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.models.quantization.base import BlockFormat, Grid
from limbeck.models.quantization.grouped import Int4G32, Nf4
from limbeck.models.quantization.k_quants import Q4_K, Q6_K
from limbeck.models.quantization.legacy import Q4_0, Q5_0, Q8_0
from limbeck.registry import Registry

FORMATS: Registry[BlockFormat] = Registry(
    "quantisation format",
    {
        "q4_0": Q4_0,
        "q5_0": Q5_0,
        "q8_0": Q8_0,
        "q4_k": Q4_K,
        "q6_k": Q6_K,
        "int4_g32": Int4G32,
        "nf4": Nf4,
    },
    entry_points="limbeck.quantization_formats",
)


def divides(format: BlockFormat, weight_OI: Tensor) -> bool:
    """Whether blocks divide the rows of a matrix."""
    return weight_OI.ndim == 2 and weight_OI.shape[1] % format.width == 0


@torch.no_grad()
def grid_of(format: BlockFormat, weight_OI: Tensor) -> Grid:
    """The grid of each block of a matrix, row by row."""
    return format.grid(_blocks(format, weight_OI))


@torch.no_grad()
def weighted_grid(format: BlockFormat, weight_OI: Tensor, importance_I: Tensor) -> Grid:
    """The grid of each block, of the format's candidates the one with the least error weighted by importance.

    Args:
        importance_I: factor on the squared error of each column.
    """
    weight_NB = _blocks(format, weight_OI)
    # Columns that were never fed count a little: a block of them has a choice to make, too.
    floor = importance_I.mean().clamp_min(1e-30) * 1e-6
    importance_NB = _blocks(format, importance_I.clamp_min(floor).expand_as(weight_OI))
    chosen: Grid | None = None
    least_N1 = weight_NB.new_full((len(weight_NB), 1), torch.inf)
    for grid in format.candidates(weight_NB, importance_NB):
        error_NB = format.decode(format.levels(weight_NB, grid), grid).sub_(weight_NB)
        error_N1 = error_NB.square_().mul_(importance_NB).sum(-1, keepdim=True)
        better_N1 = error_N1 < least_N1
        least_N1 = torch.where(better_N1, error_N1, least_N1)
        chosen = grid if chosen is None else tuple(map(torch.where, [better_N1] * len(grid), grid, chosen))
    assert chosen is not None, "a format has one candidate at least"
    return chosen


@torch.no_grad()
def snap(format: BlockFormat, weight_OI: Tensor, grid: Grid) -> Tensor:
    """The matrix with each weight at the nearest value of its block's grid, as the file's readers decode it."""
    level_NB = format.levels(_blocks(format, weight_OI), grid)
    return format.decode(level_NB, grid).view(weight_OI.shape)


@torch.no_grad()
def packed(format: BlockFormat, weight_OI: Tensor, grid: Grid) -> Tensor:
    """The bytes (O, bytes of a row) of a matrix on a grid."""
    return format.pack(format.levels(_blocks(format, weight_OI), grid), grid).view(len(weight_OI), -1)


def quantise(format: BlockFormat, weight_OI: Tensor) -> Tensor:
    """The bytes (O, bytes of a row) of a matrix: post-training quantisation."""
    return packed(format, weight_OI, grid_of(format, weight_OI))


@torch.no_grad()
def dequantise(format: BlockFormat, bytes_OY: Tensor) -> Tensor:
    """The matrix (O, I) that bytes stand for."""
    return format.decode(*format.unpack(bytes_OY.reshape(-1, format.block_bytes))).view(len(bytes_OY), -1)


def _blocks(format: BlockFormat, weight_OI: Tensor) -> Tensor:
    return weight_OI.detach().to(torch.float32).reshape(-1, format.width)
