"""Whole numbers in as few bits as their range takes: rows of K numbers as rows of bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Read as four bytes at any of eight places within the first.
MOST_BITS = 25


def width_of(count: int) -> int:
    """Bits that hold any number below `count`: ceil(log2(count)), at least 1."""
    return max(1, (count - 1).bit_length())


def packed_bytes(numbers: int, bits: int) -> int:
    """Bytes of a row of so many numbers."""
    return -(-numbers * bits // 8)


def pack(values_NK: npt.NDArray[np.integer], bits: int) -> Bytes:
    """Rows of bytes, the lowest bit first: number j of a row has the bits from j * bits on."""
    assert 1 <= bits <= MOST_BITS and (not values_NK.size or 0 <= values_NK.min() <= values_NK.max() < 1 << bits)
    rows, numbers = values_NK.shape
    flags = (values_NK[:, :, None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(flags.astype(np.uint8).reshape(rows, numbers * bits), axis=1, bitorder="little")


def unpack(packed_NB: Bytes, numbers: int, bits: int) -> npt.NDArray[np.int64]:
    """The numbers that `pack` was given."""
    first_K = np.arange(numbers) * bits
    padded_NB = np.pad(packed_NB, ((0, 0), (0, 3)))
    word_NK = np.zeros((len(packed_NB), numbers), dtype=np.uint32)
    for byte in range(4):
        word_NK |= padded_NB[:, first_K // 8 + byte].astype(np.uint32) << np.uint32(8 * byte)
    shifted_NK = word_NK >> (first_K % 8).astype(np.uint32)
    return (shifted_NK & np.uint32((1 << bits) - 1)).astype(np.int64)
