"""The base class of block formats, and number helpers that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

# What decides the values that the weights of each block may have: tensors of (blocks, numbers per block).
Grid = tuple[Tensor, ...]


class BlockFormat(ABC):
    """A way to keep weights in few bits: a frozen dataclass that knows one layout.

    All tensors are float32 of (blocks, width), codes too, so that a weight costs no more than a few passes over it.

    Attributes:
        width: weights of a block.
        block_bytes: bytes of a packed block.
        gguf: name of the type in GGUF files; None where it has none.
        replacement: what llama.cpp takes for rows that the block does not divide.
    """

    width: ClassVar[int]
    block_bytes: ClassVar[int]
    gguf: ClassVar[str | None] = None
    replacement: ClassVar[str | None] = None

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.block_bytes / self.width

    @classmethod
    def weights_in(cls, blocks: Tensor) -> int:
        """Number of weights that bytes stand for."""
        return blocks.numel() // cls.block_bytes * cls.width

    @abstractmethod
    def grid(self, weight_NB: Tensor) -> Grid:
        """The grid of each block, chosen for its weights."""

    def candidates(self, weight_NB: Tensor, importance_NB: Tensor) -> Iterator[Grid]:
        """Grids to choose from for each block where errors count by their importance; the plain one unless a format
        has others.

        Args:
            importance_NB: factor on the squared error of each weight, above 0.
        """
        del importance_NB
        yield self.grid(weight_NB)

    @abstractmethod
    def levels(self, weight_NB: Tensor, grid: Grid) -> Tensor:
        """The nearest level of each weight on a grid, as whole numbers."""

    @abstractmethod
    def decode(self, level_NB: Tensor, grid: Grid) -> Tensor:
        """The weights at some levels, rounded as readers of the file round them."""

    @abstractmethod
    def pack(self, level_NB: Tensor, grid: Grid) -> Tensor:
        """Bytes (blocks, block_bytes) of levels and grids."""

    @abstractmethod
    def unpack(self, block_NY: Tensor) -> tuple[Tensor, Grid]:
        """Levels and grids out of bytes. Of a grid only what `decode` reads need be there."""


def half(value_N1: Tensor) -> Tensor:
    """Values as float16 keeps them, in float32."""
    return value_N1.to(torch.float16).to(torch.float32)


def half_bytes(value_NK: Tensor) -> Tensor:
    """Values as the bytes of little-endian float16."""
    return value_NK.to(torch.float16).contiguous().view(torch.uint8)


def of_half_bytes(bytes_NY: Tensor) -> Tensor:
    """Float32 values out of the bytes of float16."""
    return bytes_NY.contiguous().view(torch.float16).to(torch.float32)


def inverse(value: Tensor) -> Tensor:
    """1 / value, and 0 for 0."""
    return torch.where(value == 0, torch.zeros_like(value), 1 / value)


def nibbles(level_NB: Tensor) -> Tensor:
    """Levels of 0 to 15 as bytes: the first half of a block in the low four bits, the second in the high ones."""
    low, high = level_NB.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def of_nibbles(bytes_NY: Tensor) -> Tensor:
    """Levels out of `nibbles`."""
    return torch.cat([bytes_NY & 15, bytes_NY >> 4], dim=-1).to(torch.float32)
