"""Block formats against other implementations: the gguf package, llama.cpp's own code, and bitsandbytes."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from limbeck.models.quantization import FORMATS, BlockFormat, dequantise, divides, grid_of, packed, quantise, snap

NAMES = list(FORMATS)
IN_GGUF = [name for name in NAMES if FORMATS[name].gguf is not None]
EXACT = ("q4_0", "q5_0", "q8_0")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev"
)


def drawn(rows: int = 24, columns: int = 512, seed: int = 0) -> Tensor:
    """Weights like trained ones, with outliers, a row of zeros, a block of one value, and tiny and huge rows."""
    draws = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns, generator=draws)
    weight[:, ::37] *= 5
    weight[0] = 0
    weight[1] = 0.25
    weight[2, :256] = 0
    weight[3] *= 1e-6
    weight[4] *= 1e4
    weight[5] = weight[5].abs()
    weight[6] = -weight[6].abs()
    return weight


def kind(format: BlockFormat) -> GGMLQuantizationType:
    return GGMLQuantizationType[format.gguf or ""]


@pytest.mark.parametrize("name", NAMES)
class TestEveryFormat:
    def test_snapping_is_what_the_bytes_say(self, name: str) -> None:
        format, weight = FORMATS.build(name), drawn()
        grid = grid_of(format, weight)
        blocks = packed(format, weight, grid)
        assert blocks.dtype == torch.uint8
        assert blocks.shape == (len(weight), weight.shape[1] // format.width * format.block_bytes)
        snapped = snap(format, weight, grid)
        assert torch.equal(dequantise(format, blocks), snapped)
        assert torch.equal(quantise(format, weight), blocks)

    def test_what_is_on_a_grid_stays_where_it_is(self, name: str) -> None:
        # A scale that float16 hardly holds differs too much from the one that levels are taken with.
        format, weight = FORMATS.build(name), drawn(seed=1)[4:]
        grid = grid_of(format, weight)
        snapped = snap(format, weight, grid)
        assert torch.equal(snap(format, snapped, grid), snapped)
        assert torch.equal(packed(format, snapped, grid), packed(format, weight, grid))

    def test_the_error_is_that_of_so_many_bits(self, name: str) -> None:
        format = FORMATS.build(name)
        weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
        error = (dequantise(format, quantise(format, weight)) - weight).square().mean().sqrt().item()
        most = {4: 0.11, 5: 0.055, 6: 0.03, 8: 0.008}[int(format.bits_per_weight)]
        assert most / 4 < error < most

    def test_weights_off_the_grid_stop_at_its_ends(self, name: str) -> None:
        """Trained weights may leave the range that the grid was chosen for."""
        format, weight = FORMATS.build(name), drawn(seed=3)
        grid = grid_of(format, weight)
        far = snap(format, 3 * weight, grid)
        assert torch.equal(dequantise(format, packed(format, 3 * weight, grid)), far)
        ordinary = slice(7, None)
        assert (far[ordinary].abs() <= 1.3 * weight[ordinary].abs().amax(1, keepdim=True)).all()

    def test_rows_that_blocks_do_not_divide(self, name: str) -> None:
        format = FORMATS.build(name)
        assert divides(format, torch.zeros(2, 2 * format.width)) and not divides(
            format, torch.zeros(2, format.width + 16)
        )


@pytest.mark.parametrize("name", IN_GGUF)
def test_the_gguf_package_reads_the_same_weights(name: str) -> None:
    format, weight = FORMATS.build(name), drawn(seed=4)
    assert GGML_QUANT_SIZES[kind(format)] == (format.width, format.block_bytes)
    blocks = quantise(format, weight)
    read = torch.from_numpy(quants.dequantize(blocks.numpy(), kind(format)))
    assert torch.equal(read, dequantise(format, blocks))


@pytest.mark.parametrize("name", EXACT)
def test_the_gguf_package_writes_the_same_bytes(name: str) -> None:
    format, weight = FORMATS.build(name), drawn(seed=5)
    expected = torch.from_numpy(quants.quantize(weight.numpy(), kind(format)))
    ours = quantise(format, weight)
    # Of a block of zeros the sign of the scale is of no consequence.
    assert torch.equal(dequantise(format, ours), dequantise(format, expected))
    assert torch.equal(ours[7:], expected[7:])


def llama_cpp_blocks(format: BlockFormat, weight: Tensor) -> Tensor:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("*.so"))))
    run = library.ggml_quantize_chunk
    run.restype = ctypes.c_size_t
    run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    source = numpy.ascontiguousarray(weight.numpy())
    out = numpy.zeros((len(weight), weight.shape[1] // format.width * format.block_bytes), dtype=numpy.uint8)
    size = run(int(kind(format)), source.ctypes.data, out.ctypes.data, 0, *weight.shape, None)
    assert size == out.size
    return torch.from_numpy(out)


@needs_llama_cpp
@pytest.mark.parametrize("name", IN_GGUF)
def test_llama_cpp_chooses_the_same_grids(name: str) -> None:
    """The legacy formats byte for byte. The search of the k-quants adds up in another order, which decides ties."""
    format, weight = FORMATS.build(name), drawn(rows=64, seed=6)
    theirs, ours = llama_cpp_blocks(format, weight), quantise(format, weight)
    if name in EXACT:
        assert torch.equal(dequantise(format, ours), dequantise(format, theirs))
        return
    same = (ours == theirs)[7:].float().mean().item()
    errors = [(dequantise(format, blocks) - weight).square().sum(1) for blocks in (ours, theirs)]
    assert same > 0.97
    assert (errors[0] <= 1.02 * errors[1] + 1e-12).all()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_keeps_the_same_weights() -> None:
    functional = importlib.import_module("bitsandbytes.functional")

    format, weight = FORMATS.build("nf4"), drawn(seed=7)
    blocks, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(functional.dequantize_4bit(blocks, state), dequantise(format, quantise(format, weight)))
