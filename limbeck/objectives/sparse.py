"""Sparse signals: the part of the teacher's distribution that is kept, from logits or from hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.objectives.fused.projection import prepare_projection
from limbeck.types import DenseSignal, LimbeckError, SampledSignal, Support, TopKSignal

# Logits of so many bytes exist at a time.
SPARSE_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class SparseForm:
    """The form of a sparse signal, and its computation from a dense one.

    Attributes:
        support: "topk_tail" and "topk_renorm" keep the same tokens; "sampled" draws them from the teacher.
        k: tokens kept a position, or draws.
        temperatures: the grid of loss temperatures that the result is exact for.
    """

    support: Support
    k: int
    temperatures: tuple[float, ...]

    @torch.no_grad()
    def of(self, signal: DenseSignal, *, seed: int, chosen_NS: Tensor | None = None) -> TopKSignal | SampledSignal:
        """The sparse signal of the same positions.

        Args:
            seed: of the draws; what is drawn depends on it and on the positions alone.
            chosen_NS: tokens that are kept in any case; see `topk_signal`.

        Raises:
            LimbeckError: for a k or a temperature that makes no sense.
        """
        head = prepare_projection(signal.hidden_ND, signal.head, "teacher")
        generator = torch.Generator(signal.hidden_ND.device).manual_seed(seed)
        blocks = []
        rows = max(1, SPARSE_BLOCK_BYTES // (head.vocab_size * head.dtype.itemsize))
        for start in range(0, max(len(signal.hidden_ND), 1), rows):
            hidden_ND = signal.hidden_ND[start : start + rows]
            logits_NV = hidden_ND.new_empty(len(hidden_ND), head.vocab_size, dtype=head.dtype)
            head.into(hidden_ND, logits_NV)
            some_NS = None if chosen_NS is None else chosen_NS[start : start + rows]
            blocks.append(self._block(head.finish.logits(logits_NV), generator, some_NS))
        return blocks[0] if len(blocks) == 1 else _joined(blocks)

    def _block(
        self, logits_NV: Tensor, generator: torch.Generator, chosen_NS: Tensor | None
    ) -> TopKSignal | SampledSignal:
        if self.support == "sampled":
            return sampled_signal(logits_NV, self.k, self.temperatures, generator)
        return topk_signal(logits_NV, self.k, self.temperatures, chosen_NS)


def _joined(blocks: list[TopKSignal | SampledSignal]) -> TopKSignal | SampledSignal:
    kind = type(blocks[0])
    columns = {name: torch.cat([getattr(block, name) for block in blocks]) for name in sparse_columns(kind)}
    return kind(**columns, temperatures=blocks[0].temperatures)


def sparse_columns(kind: type[TopKSignal | SampledSignal]) -> tuple[str, ...]:
    """Names of the tensors of a sparse signal, each with one row per token."""
    common = ("ids_NK", "logp_NK", "log_z_NG")
    return common if kind is TopKSignal else (*common, "count_NK", "log_proposal_NK")


def topk_signal(
    logits_NV: Tensor, k: int, temperatures: tuple[float, ...] = (1.0,), chosen_NS: Tensor | None = None
) -> TopKSignal:
    """The teacher's k most likely tokens, with the exact normaliser of every temperature of the grid.

    The logits are those of real tokens alone: cut padding slots off first, as `SparseForm` does.

    Args:
        chosen_NS: tokens that are kept too, such as the student's own likeliest; different ones of each position. Every
            position has k + S tokens: where both lists have a token, the teacher's next one is kept in its place.

    Raises:
        LimbeckError: for a k or a temperature that makes no sense.
    """
    kept = k if chosen_NS is None else k + chosen_NS.shape[-1]
    if not 1 <= k <= kept <= logits_NV.shape[-1]:
        more = "" if chosen_NS is None else f" and {chosen_NS.shape[-1]} chosen ones"
        raise LimbeckError(
            f"top-k with k={k}{more} of {logits_NV.shape[-1]} tokens: expected 1 to {logits_NV.shape[-1]}"
        )
    log_p_NV, log_z_NG = _capture(logits_NV, temperatures)
    if chosen_NS is None:
        logp_NK, ids_NK = log_p_NV.topk(k, dim=-1)
    else:
        first_NV = log_p_NV.scatter(-1, chosen_NS.to(log_p_NV.device), torch.inf)
        ids_NK = first_NV.topk(kept, dim=-1).indices
        logp_NK, order_NK = log_p_NV.gather(-1, ids_NK).sort(dim=-1, descending=True)
        ids_NK = ids_NK.gather(-1, order_NK)
    return TopKSignal(ids_NK=ids_NK, logp_NK=logp_NK, temperatures=temperatures, log_z_NG=log_z_NG)


def sampled_signal(
    logits_NV: Tensor, draws: int, temperatures: tuple[float, ...] = (1.0,), generator: torch.Generator | None = None
) -> SampledSignal:
    """A sample of the teacher: `draws` tokens per position, drawn from its own distribution, equal ones counted.

    Raises:
        LimbeckError: for no draws, or a temperature that makes no sense.
    """
    if draws < 1:
        raise LimbeckError(f"a sample of {draws} draws: expected at least one; RS-KD takes about 50")
    log_p_NV, log_z_NG = _capture(logits_NV, temperatures)
    drawn_NR = log_p_NV.exp().multinomial(draws, replacement=True, generator=generator).sort(dim=-1).values
    first_NR = torch.ones_like(drawn_NR, dtype=torch.bool)
    first_NR[:, 1:] = drawn_NR[:, 1:] != drawn_NR[:, :-1]
    count_NR = (drawn_NR.unsqueeze(-1) == drawn_NR.unsqueeze(-2)).sum(-1) * first_NR
    logp_NR = log_p_NV.gather(-1, drawn_NR)
    return SampledSignal(
        ids_NK=drawn_NR,
        count_NK=count_NR,
        logp_NK=logp_NR,
        log_proposal_NK=logp_NR,
        temperatures=temperatures,
        log_z_NG=log_z_NG,
    )


def _capture(logits_NV: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    for tau in temperatures:
        if not (math.isfinite(tau) and tau > 0):
            raise LimbeckError(f"temperature {tau} of the cache's grid: expected positive numbers")
    log_p_NV = (logits_NV.float() if logits_NV.itemsize < 4 else logits_NV).log_softmax(-1)
    return log_p_NV, torch.cat([(log_p_NV / tau).logsumexp(-1, keepdim=True) for tau in temperatures], dim=-1)
