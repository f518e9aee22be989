"""Weights in few bits: the formats, and which weights of a model are kept in which.

A format cuts each row of a matrix into blocks. The grid of a block is the values its weights may have; it follows from
the block's scales. `quantise` chooses grids and levels and packs both into bytes; `dequantise` gives the weights that
a reader of the bytes computes with, bit for bit.
"""

from limbeck.models.quantization.base import BlockFormat, Grid
from limbeck.models.quantization.formats import (
    FORMATS,
    dequantise,
    divides,
    grid_of,
    packed,
    quantise,
    snap,
    weighted_grid,
)

__all__ = [
    "FORMATS",
    "BlockFormat",
    "Grid",
    "dequantise",
    "divides",
    "grid_of",
    "packed",
    "quantise",
    "snap",
    "weighted_grid",
]
