"""The head of a model as this package uses it: the real rows of its weight, in the dtype the products run in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.ops import onednn
from limbeck.types import Head, LimbeckError

STRIP_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """Transform of a head's product: the scale, then the soft-cap."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, product_NV: Tensor) -> Tensor:
        logits_NV = product_NV if self.scale == 1.0 else product_NV * self.scale
        if self.softcap is None:
            return logits_NV
        return self.softcap * (logits_NV / self.softcap).tanh()

    def slope(self, logits_NV: Tensor) -> Tensor | float:
        """Derivative of the logits in the product, at the logits."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits_NV / self.softcap) ** 2)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A head made ready for tiles.

    Attributes:
        weight_VD: real rows only, in the dtype of the matrix products.
        bias_V: in the working dtype, or None.
        finish: the head's scale and soft-cap, applied in the working dtype.
        dtype: the working dtype of everything after the product: float64 for float64 models, else float32.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    finish: LogitTransform
    dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    def into(self, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """Write hidden @ weight.T + bias into rows of a buffer, of the weight's dtype or the working one."""
        hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        if onednn.fits(hidden_ND, self.weight_VD):
            # oneDNN returns a new tensor. In strips it is still in the processor's cache when it is copied, and small
            # enough for the C library to hand out the same pages again.
            width = max(1, STRIP_BYTES // (out_NV.element_size() * len(hidden_ND)))
            for strip_NX, weight_XD in zip(out_NV.split(width, 1), self.weight_VD.split(width), strict=True):
                strip_NX.copy_(onednn.product(hidden_ND, weight_XD))
        elif self.weight_VD.dtype != out_NV.dtype:
            out_NV.copy_(hidden_ND @ self.weight_VD.T)
        elif self.bias_V is None:
            torch.mm(hidden_ND, self.weight_VD.T, out=out_NV)
        else:
            # In one call: in half precision a sum of its own would round a second time.
            torch.addmm(self.bias_V.to(out_NV.dtype), hidden_ND, self.weight_VD.T, out=out_NV)
            return
        if self.bias_V is not None:
            out_NV.add_(self.bias_V)


def gather_head(head: Head) -> Head:
    """A head whose parameters are whole on this rank; one sharded by FSDP2 is gathered, once.

    The way back scatters its gradient once and averages it over the ranks, as FSDP2 does with the other parameters.
    """
    weight_VD = gather_parameter(head.weight_VD)
    return replace(head, weight_VD=weight_VD, bias_V=None if head.bias_V is None else gather_parameter(head.bias_V))


def gather_parameter(parameter: Tensor) -> Tensor:
    """A parameter whole on this rank; the gradient of one that is sharded is scattered and averaged over the ranks."""
    if not torch.distributed.is_available():
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    return _DividedGrad.apply(whole, mesh.size())


class _DividedGrad(torch.autograd.Function):
    """The tensor itself; its gradient divided. A sum over the ranks becomes their mean."""

    @staticmethod
    def forward(ctx, parameter: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad / ctx.divisor, None


def prepare_projection(hidden_ND: Tensor, head: Head, side: str) -> Projection:
    """Check hidden states against their head and fix the dtypes, following autocast where it is on.

    Raises:
        LimbeckError: where shapes or dtypes of the two disagree.
    """
    weight_VD = head.weight_VD
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise LimbeckError(
            f"{side} hidden states {tuple(hidden_ND.shape)} do not fit its head {tuple(weight_VD.shape)}: "
            "expected (N, D) and (V, D); select the tokens of the loss first"
        )
    if not 0 < head.vocab_size <= weight_VD.shape[0]:
        raise LimbeckError(
            f"{side} head has {weight_VD.shape[0]} rows but vocab_size {head.vocab_size}: give the number of real ids"
        )
    if head.bias_V is not None and head.bias_V.shape != weight_VD.shape[:1]:
        raise LimbeckError(
            f"{side} bias has shape {tuple(head.bias_V.shape)}: expected ({weight_VD.shape[0]},), one per row"
        )
    compute = _compute_dtype(hidden_ND, weight_VD, side)
    work = torch.float64 if compute == torch.float64 else torch.float32
    bias_V = None if head.bias_V is None else head.bias_V[: head.vocab_size].detach().to(work)
    return Projection(
        weight_VD=weight_VD[: head.vocab_size].detach().to(compute),
        bias_V=bias_V,
        finish=LogitTransform(scale=float(head.scale), softcap=None if head.softcap is None else float(head.softcap)),
        dtype=work,
    )


def _compute_dtype(hidden_ND: Tensor, weight_VD: Tensor, side: str) -> torch.dtype:
    device = hidden_ND.device.type
    autocast = torch.is_autocast_enabled(device) and torch.float64 not in (hidden_ND.dtype, weight_VD.dtype)
    if not autocast and hidden_ND.dtype != weight_VD.dtype:
        raise LimbeckError(
            f"{side} hidden states are {hidden_ND.dtype}, its head is {weight_VD.dtype}: cast one, or use autocast"
        )
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_ND.dtype
    # The gradients are made before a loss scaler could lift them over float16's smallest number.
    return torch.float32 if dtype == torch.float16 else dtype
