"""Codecs of sparse signals: the likeliest tokens, or a sample of all, packed into bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from limbeck.teachers.store.base import Frame, Kind, Layout
from limbeck.types import Head, LimbeckError, SampledSignal, Signal, TopKSignal

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from limbeck.teachers.store.base import Columns

# Log-probabilities as they are, not in levels.
WHOLE = 32
_FEWEST, _MOST = 4, 16


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k likeliest tokens, whose log-probabilities and tail are exact at the temperatures of the store.

    Attributes:
        k: tokens kept of each position.
        bits: of each log-probability, 4 to 16; 32 keeps them as they are.
    """

    k: int = 64
    bits: int = 9

    kind: ClassVar[Kind] = "topk"

    def check(self, frame: Frame) -> None:
        if not 1 <= self.k <= frame.vocab_size:
            raise LimbeckError(f"codec topk k={self.k}: the teacher has {frame.vocab_size} tokens; expected 1 to that")
        _check_bits("topk", self.bits)

    def layout(self, frame: Frame) -> Layout:
        more: Layout = {} if self.bits == WHOLE else {"tail": ("float16", (1,))}
        return _layout(frame, self.k, self.bits) | more

    def shared(self, head: Head, hidden_ND: Tensor) -> dict[str, Tensor]:
        return {}

    def shared_bytes(self, frame: Frame, number_bytes: int) -> int:
        return 0

    def encode(self, signal: Signal, frame: Frame, shared: Mapping[str, Tensor]) -> Columns:
        import numpy as np

        assert isinstance(signal, TopKSignal), type(signal)
        columns = _columns(signal, frame, self.k, self.bits)
        if self.bits == WHOLE:
            return columns
        tail_N1 = 1 - signal.logp_NK.double().exp().sum(-1, keepdim=True)
        return columns | {"tail": tail_N1.clamp_min(2.0**-24).log().cpu().numpy().astype(np.float16)}

    def decode(self, columns: Columns, frame: Frame, head: Head | None) -> TopKSignal:
        import torch

        from limbeck.teachers.store.quantize import with_mass

        logp_NK = _log_probabilities(columns, self.k, self.bits)
        if self.bits != WHOLE:
            logp_NK = with_mass(logp_NK, columns["tail"])
        return TopKSignal(
            ids_NK=torch.from_numpy(_ids(columns, frame, self.k)),
            logp_NK=torch.from_numpy(logp_NK),
            temperatures=frame.temperatures,
            log_z_NG=_log_z(columns, frame, len(logp_NK)),
        )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A sample of the teacher's distribution (RS-KD), unbiased for forward KL: tokens drawn, equal ones counted.

    Attributes:
        draws: tokens drawn at each position.
        bits: of each log-probability, 4 to 16; 32 keeps them as they are. At temperature 1 no gradient reads them.
    """

    draws: int = 12
    bits: int = 9

    kind: ClassVar[Kind] = "sampled"

    def check(self, frame: Frame) -> None:
        if self.draws < 1:
            raise LimbeckError(f"codec sampled draws={self.draws}: expected at least one; RS-KD takes about 12")
        _check_bits("sampled", self.bits)

    def layout(self, frame: Frame) -> Layout:
        return _layout(frame, self.draws, self.bits)

    def shared(self, head: Head, hidden_ND: Tensor) -> dict[str, Tensor]:
        return {}

    def shared_bytes(self, frame: Frame, number_bytes: int) -> int:
        return 0

    def encode(self, signal: Signal, frame: Frame, shared: Mapping[str, Tensor]) -> Columns:
        assert isinstance(signal, SampledSignal), type(signal)
        # Ids in order, each as often as it was drawn, say how often that was.
        return _columns(signal, frame, self.draws, self.bits)

    def decode(self, columns: Columns, frame: Frame, head: Head | None) -> SampledSignal:
        import torch

        ids_NK = torch.from_numpy(_ids(columns, frame, self.draws))
        logp_NK = torch.from_numpy(_log_probabilities(columns, self.draws, self.bits))
        first_NK = torch.ones_like(ids_NK, dtype=torch.bool)
        first_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
        return SampledSignal(
            ids_NK=ids_NK,
            count_NK=(ids_NK.unsqueeze(-1) == ids_NK.unsqueeze(-2)).sum(-1) * first_NK,
            logp_NK=logp_NK,
            log_proposal_NK=logp_NK,
            temperatures=frame.temperatures,
            log_z_NG=_log_z(columns, frame, len(ids_NK)),
        )


def _check_bits(codec: str, bits: int) -> None:
    if bits != WHOLE and not _FEWEST <= bits <= _MOST:
        raise LimbeckError(f"codec {codec} bits={bits}: expected {_FEWEST} to {_MOST}, or {WHOLE} for all of them")


def _layout(frame: Frame, kept: int, bits: int) -> Layout:
    from limbeck.teachers.store.bits import packed_bytes, width_of

    found: Layout = {"ids": ("uint8", (packed_bytes(kept, width_of(frame.vocab_size)),))}
    if bits == WHOLE:
        found |= {"logp": ("float32", (kept,))}
    else:
        found |= {"levels": ("uint8", (packed_bytes(kept, bits),)), "top": ("float32", (1,)), "span": ("float16", (1,))}
    return found | ({"log_z": ("float32", (len(frame.tempered),))} if frame.tempered else {})


def _columns(signal: TopKSignal | SampledSignal, frame: Frame, kept: int, bits: int) -> dict[str, npt.NDArray[Any]]:
    from limbeck.teachers.store.bits import pack, width_of
    from limbeck.teachers.store.quantize import quantize

    logp_NK = signal.logp_NK.float().cpu()
    if signal.ids_NK.shape[1] != kept or signal.temperatures != frame.temperatures:
        raise LimbeckError(
            f"a signal of {signal.ids_NK.shape[1]} tokens at temperatures {list(signal.temperatures)} for a store of "
            f"{kept} at {list(frame.temperatures)}; expected the same"
        )
    if logp_NK.isnan().any() or (bits != WHOLE and not logp_NK.isfinite().all()):
        raise LimbeckError("the teacher's output is not finite; try teacher.dtype=float32")
    columns: dict[str, npt.NDArray[Any]] = {"ids": pack(signal.ids_NK.cpu().numpy(), width_of(frame.vocab_size))}
    if bits == WHOLE:
        columns["logp"] = logp_NK.numpy()
    else:
        levels_NK, columns["top"], columns["span"] = quantize(logp_NK.numpy(), bits)
        columns["levels"] = pack(levels_NK, bits)
    if frame.tempered:
        columns["log_z"] = signal.log_z_NG[:, list(frame.tempered)].float().cpu().numpy()
    return columns


def _ids(columns: Columns, frame: Frame, kept: int) -> npt.NDArray[Any]:
    from limbeck.teachers.store.bits import unpack, width_of

    return unpack(columns["ids"], kept, width_of(frame.vocab_size))


def _log_probabilities(columns: Columns, kept: int, bits: int) -> npt.NDArray[Any]:
    from limbeck.teachers.store.bits import unpack
    from limbeck.teachers.store.quantize import restore

    if bits == WHOLE:
        return columns["logp"]
    return restore(unpack(columns["levels"], kept, bits), columns["top"], columns["span"], bits)


def _log_z(columns: Columns, frame: Frame, tokens: int) -> Tensor:
    """Normalisers of the whole grid; that of temperature 1 is zero by definition."""
    import torch

    log_z_NG = torch.zeros(tokens, len(frame.temperatures))
    if frame.tempered:
        log_z_NG[:, list(frame.tempered)] = torch.from_numpy(columns["log_z"])
    return log_z_NG
