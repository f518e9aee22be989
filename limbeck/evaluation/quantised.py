"""Quantised stand-ins for a student that was trained in few bits: what llama.cpp's own quantiser makes of its teacher.

llama.cpp comes in the package xllamacpp, whose shared library has the function that llama-quantize calls for each
matrix.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.models.quantization import FORMATS, dequantise
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    import numpy


@cache
def quantiser() -> Any:
    """ggml_quantize_chunk of the llama.cpp that is installed.

    Raises:
        LimbeckError: none is, or it lacks the function.
    """
    spec = importlib.util.find_spec("xllamacpp")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        for path in sorted(Path(folder).glob("*.so")):
            try:
                found = ctypes.CDLL(str(path)).ggml_quantize_chunk
            except (OSError, AttributeError):
                continue
            found.restype = ctypes.c_size_t
            found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
            return found
    raise LimbeckError(
        "llama.cpp's quantiser comes in the package xllamacpp, which is not installed here or lacks it; "
        "pip install xllamacpp, or set evaluate.groups.recovery.baselines=[]"
    )


def by_llama_cpp(format: str, weight_OI: Tensor, importance_I: Tensor | None = None) -> Tensor:
    """The bytes (O, bytes of a row) that llama.cpp makes of a matrix.

    Args:
        importance_I: how much an error in each column counts; None counts all alike.
    """
    import numpy
    from gguf import GGMLQuantizationType

    known = FORMATS[format]
    assert known.gguf is not None, "checked before"
    weight, importance = _array(weight_OI), None if importance_I is None else _array(importance_I)
    out = numpy.zeros((len(weight), weight.shape[1] // known.width * known.block_bytes), dtype=numpy.uint8)
    kind = int(GGMLQuantizationType[known.gguf])
    address = None if importance is None else importance.ctypes.data
    written = quantiser()(kind, weight.ctypes.data, out.ctypes.data, 0, *weight.shape, address)
    assert written == out.size, "llama.cpp has blocks of another size"
    return torch.from_numpy(out)


def _array(tensor: Tensor) -> numpy.ndarray:
    import numpy

    return numpy.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())


@torch.no_grad()
def round_by_llama_cpp(
    model: nn.Module, formats: Mapping[str, str], importance: Mapping[str, Tensor] | None = None
) -> None:
    """Put in the place of a model's weights what llama.cpp's quantiser makes of them.

    Args:
        formats: of each weight that is quantised, by name.
        importance: of the columns of weights, by name; those that are not there count all alike.
    """
    for name, format in formats.items():
        weight = model.get_parameter(name)
        bytes_OY = by_llama_cpp(format, weight, (importance or {}).get(name))
        weight.copy_(dequantise(FORMATS.build(format), bytes_OY))
