"""Linear layers through oneDNN with their weights laid out beforehand: what decoding a few rows at a time wants.

`limbeck.ops.onednn` hands oneDNN a weight as it lies in memory, and oneDNN rearranges it at every call. With 48 rows
that is a good part of the work: [48, 576] x [576, 1536] runs at 142 GFLOP/s by F.linear, 278 through oneDNN,
383 with the weight laid out once (two Zen 5 cores). From some 250 rows on it makes no difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from limbeck.ops.onednn import product

_LINEAR = torch.nn.functional.linear


class PackedLinears(TorchFunctionMode):
    """While active, in this thread, F.linear of float32 CPU tensors goes to oneDNN. For inference: it records no
    gradient.

    A parameter's layout is prepared at its first use and kept as long as this object, which costs its size again in
    memory; parameters beyond `packed_gib` in all, and weights that are no parameters, are used as they are. A parameter
    changed in place is prepared again; one changed behind autograd's back (through `.data`, or by a step of a fused
    optimizer) is not noticed: make a new object after training.
    """

    def __init__(self, model: nn.Module, *, rows: int, packed_gib: float):
        """`rows` is the usual number of rows of a product, for which the layout is chosen."""
        TorchFunctionMode.__init__(self)
        self._rows = rows
        self._budget = int(packed_gib * 2**30)
        # Weights in few bits compute in a way of their own.
        plain = (parameter for parameter in model.parameters() if not is_traceable_wrapper_subclass(parameter))
        self._parameters = {parameter.data_ptr() for parameter in plain}
        self._packed: dict[tuple[int, torch.Size], tuple[int, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _LINEAR:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        fits = input.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.ndim == 2
        fits = fits and not is_traceable_wrapper_subclass(weight)
        if not fits or not input.numel() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return _LINEAR(input, weight, bias)
        return product(input, self._prepared(weight), bias)

    def _prepared(self, weight: Tensor) -> Tensor:
        if weight.data_ptr() not in self._parameters or not weight.is_contiguous() or weight.is_inference():
            return weight
        key = (weight.data_ptr(), weight.shape)
        version, packed = self._packed.get(key, (-1, weight))
        if version == weight._version:
            return packed
        if key not in self._packed:
            size = weight.numel() * weight.element_size()
            if size > self._budget:
                return weight
            self._budget -= size
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, self._rows)
        self._packed[key] = (weight._version, packed)
        return packed
