"""Codecs of whole distributions: the teacher's hidden states, beside one head for all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from limbeck.teachers.store.base import Frame, Kind, Layout, Precision
from limbeck.types import DenseSignal, Head, LimbeckError, Signal

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from limbeck.teachers.store.base import Columns

# numpy has no bfloat16: its bits are kept as whole numbers.
_NUMPY = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """The teacher's hidden states: every objective at every temperature, exact to the precision.

    Attributes:
        dtype: float32, bfloat16 or float16.
    """

    dtype: Precision = "float32"

    kind: ClassVar[Kind] = "dense"

    def check(self, frame: Frame) -> None:
        _check_dense("hidden", self.dtype, frame)

    def layout(self, frame: Frame) -> Layout:
        return {"hidden": (_NUMPY[self.dtype], (frame.width,))}

    def shared(self, head: Head, hidden_ND: Tensor) -> dict[str, Tensor]:
        return _tensors(head, head.weight_VD[: head.vocab_size])

    def shared_bytes(self, frame: Frame, number_bytes: int) -> int:
        return frame.vocab_size * frame.width * number_bytes

    def encode(self, signal: Signal, frame: Frame, shared: Mapping[str, Tensor]) -> Columns:
        assert isinstance(signal, DenseSignal), type(signal)
        return {"hidden": _as_numpy(signal.hidden_ND, self.dtype)}

    def decode(self, columns: Columns, frame: Frame, head: Head | None) -> DenseSignal:
        assert head is not None
        return _decoded(columns["hidden"], self.dtype, head)


@dataclass(frozen=True, kw_only=True)
class Svd:
    """Hidden states and head by their truncated SVD: every objective at every temperature, from fewer numbers.

    The logits W h are replaced by those of rank r that are closest to them in the mean square over the hidden states
    of a few responses, up to the constant per token that no softmax reads: with C their second moment and W centred,
    the singular vectors of W C^(1/2).

    Attributes:
        rank: numbers kept of each token.
        dtype: float32, bfloat16 or float16.
    """

    rank: int = 128
    dtype: Precision = "float16"

    kind: ClassVar[Kind] = "dense"

    def check(self, frame: Frame) -> None:
        _check_dense("svd", self.dtype, frame)
        if not 1 <= self.rank <= frame.width:
            raise LimbeckError(f"codec svd rank={self.rank}: the teacher's states have {frame.width} numbers; lower it")

    def layout(self, frame: Frame) -> Layout:
        return {"hidden": (_NUMPY[self.dtype], (self.rank,))}

    def shared(self, head: Head, hidden_ND: Tensor) -> dict[str, Tensor]:
        import torch

        weight_VD = head.weight_VD[: head.vocab_size].detach().double().cpu()
        if head.softcap is None:
            weight_VD = weight_VD - weight_VD.mean(0)
        states_ND = hidden_ND.detach().double().cpu()
        moment_DD = states_ND.T @ states_ND / len(states_ND)
        # A direction that these few tokens do not have is not impossible.
        floor = 1e-6 * moment_DD.trace() / len(moment_DD)
        value_D, vector_DD = torch.linalg.eigh(moment_DD)
        value_D = value_D.clamp_min(0) + floor
        root_DD = vector_DD * value_D.sqrt() @ vector_DD.T
        inverse_DD = vector_DD * value_D.rsqrt() @ vector_DD.T
        # The right singular vectors of W C^(1/2), the largest last; its left ones would have V rows.
        _, right_DD = torch.linalg.eigh(root_DD @ (weight_VD.T @ weight_VD) @ root_DD)
        kept_DR = right_DD[:, -self.rank :]
        # In units of their own size, so that half a precision is fine for all of them.
        projected = _tensors(head, (weight_VD @ root_DD @ kept_DR).float())
        return projected | {"encoder": (inverse_DD @ kept_DR).float().contiguous()}

    def shared_bytes(self, frame: Frame, number_bytes: int) -> int:
        return 4 * self.rank * (frame.vocab_size + frame.width)

    def encode(self, signal: Signal, frame: Frame, shared: Mapping[str, Tensor]) -> Columns:
        assert isinstance(signal, DenseSignal), type(signal)
        hidden_NR = signal.hidden_ND.detach().float() @ shared["encoder"].to(signal.hidden_ND.device)
        return {"hidden": _as_numpy(hidden_NR, self.dtype)}

    def decode(self, columns: Columns, frame: Frame, head: Head | None) -> DenseSignal:
        assert head is not None
        return _decoded(columns["hidden"], self.dtype, head)


def _check_dense(codec: str, dtype: str, frame: Frame) -> None:
    if dtype not in _NUMPY:
        raise LimbeckError(f"codec {codec} dtype={dtype!r}: expected {', '.join(_NUMPY)}")
    if not frame.width:
        raise LimbeckError(f"codec {codec} keeps hidden states, which this teacher does not give; choose codec topk")


def _tensors(head: Head, weight: Tensor) -> dict[str, Tensor]:
    tensors = {"weight": weight.detach().cpu().contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach()[: head.vocab_size].cpu().contiguous()
    return tensors


def _as_numpy(hidden_ND: Tensor, dtype: str) -> npt.NDArray[Any]:
    import torch

    if not hidden_ND.isfinite().all():
        raise LimbeckError("the teacher's output is not finite; try teacher.dtype=float32")
    stored_ND = hidden_ND.detach().to("cpu", getattr(torch, dtype)).contiguous()
    if not stored_ND.isfinite().all():
        raise LimbeckError(
            f"hidden states overflow {dtype}; choose float32 or bfloat16 (teacher.cache_dtype, or dtype of the codec)"
        )
    return (stored_ND.view(torch.uint16) if dtype == "bfloat16" else stored_ND).numpy()


def _decoded(column: npt.NDArray[Any], dtype: str, head: Head) -> DenseSignal:
    return DenseSignal(hidden_ND=_as_tensor(column, dtype).to(head.weight_VD.dtype), head=head)


def _as_tensor(column: npt.NDArray[Any], dtype: str) -> Tensor:
    import torch

    read = torch.from_numpy(column)
    return read.view(torch.bfloat16) if dtype == "bfloat16" else read
