"""Bytes that the weights of a GGUF file are written as: floats, blocks of a format, or the blocks that were trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from limbeck.models.loading import DTYPES
from limbeck.models.quantization import FORMATS, dequantise, divides, quantise
from limbeck.models.quantization.files import QuantizedWeights
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the k-quants and 4-bit formats leave the token embeddings and the head in, as student.quantize does.
_EMBEDDINGS = "q8_0"
GGUF_FORMATS = tuple(sorted((n for n, f in FORMATS.items() if f.gguf is not None), key=lambda n: n == "q8_0"))


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the matrices of a model are written.

    Attributes:
        dtype: what most of them are in: float32, float16, bfloat16 or the name of a block format.
        blocks: format and bytes of the weights that are written in blocks, by name; others are floats.
    """

    dtype: str
    blocks: Mapping[str, tuple[str, Tensor]] = field(default_factory=dict)

    @property
    def floats(self) -> str:
        """What matrices without blocks are written in."""
        return self.dtype if self.dtype in DTYPES else "float32"

    @classmethod
    def of_blocks(cls, quantized: QuantizedWeights) -> Encoding:
        """The blocks that were trained.

        Raises:
            LimbeckError: a format that no GGUF file holds.
        """
        for name, chosen in quantized.formats.items():
            if FORMATS[chosen].gguf is None:
                raise LimbeckError(
                    f"{name} was trained in {chosen}, which GGUF files do not hold; export safetensors, or quantise "
                    f"the student again with --dtype, one of {', '.join(GGUF_FORMATS)}"
                )
        return cls(dtype=most_of(quantized), blocks={n: (quantized.formats[n], b) for n, b in quantized.blocks.items()})

    @classmethod
    def rounded(cls, model: PreTrainedModel, dtype: str, say: Callable[[str], None]) -> Encoding:
        """The weights of a model, quantised. Where a format's blocks do not divide the rows another one stands in.

        Args:
            say: called with each format that stands in.
        """
        ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        blocks: dict[str, tuple[str, Tensor]] = {}
        replaced: dict[str, int] = {}
        for name, weight in model.named_parameters():
            if weight.ndim != 2:
                continue
            wanted = _EMBEDDINGS if id(weight) in ends else dtype
            chosen: str | None = wanted
            while chosen is not None and not divides(FORMATS.build(chosen), weight):
                chosen = FORMATS[chosen].replacement
            if chosen != wanted:
                replaced[chosen or "float32"] = replaced.get(chosen or "float32", 0) + 1
            if chosen is not None:
                blocks[name] = chosen, quantise(FORMATS.build(chosen), weight)
        for chosen, count in replaced.items():
            say(f"export: {count} matrices are in {chosen}, since blocks of {dtype} do not divide their rows")
        return cls(dtype=dtype, blocks=blocks)


def most_of(quantized: QuantizedWeights) -> str:
    """The format of most matrices."""
    chosen = [*quantized.formats.values()]
    return max(dict.fromkeys(chosen), key=chosen.count)


@torch.no_grad()
def put_back(model: PreTrainedModel, blocks: Mapping[str, tuple[str, Tensor]]) -> None:
    """Let a model have the weights that blocks stand for."""
    for name, (format, bytes_OY) in blocks.items():
        weight: Tensor = model.get_parameter(name)
        weight.copy_(dequantise(FORMATS.build(format), bytes_OY))


@torch.no_grad()
def differing(model: PreTrainedModel, blocks: Mapping[str, tuple[str, Tensor]]) -> str | None:
    """The first weight that is not what its block stands for, bit for bit; None where all are."""
    for name, (format, bytes_OY) in blocks.items():
        if not torch.equal(model.get_parameter(name), dequantise(FORMATS.build(format), bytes_OY)):
            return name
    return None
