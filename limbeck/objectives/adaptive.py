"""Divergences that weigh directions or tokens by what the two rows look like: AKL, ToDi, tail-aware, entropy-gated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.objectives.base import LOG_ZERO, Objective, Rows
from limbeck.objectives.divergences import (
    Divergence,
    ForwardKL,
    ReverseKL,
    RowObjective,
    check_fraction,
    through_softmax,
)
from limbeck.objectives.temperature import scaled
from limbeck.types import DenseSignal, LimbeckError

GateMode = Literal["add", "switch"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Divergence):
    """c_h KL(p||q) + c_t KL(q||p) with c_h + c_t = 1, by where the two differ: in the teacher's head or in its tail.

    AKL, arXiv 2404.02657: the head is the teacher's most likely tokens up to a mass of mu, at least one; c_h is its
    share of sum |p - q|. The shares are held constant; equal rows get half each.
    Limits: tau^2 D tends to half the variance of the logit error at high temperature.

    Attributes:
        mu: the mass of the head, in (0, 1).
    """

    name = "akl"

    mu: float = 0.5

    def __post_init__(self) -> None:
        check_fraction(self.name, "mu", self.mu)

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        gap_NK = (rows.p_NK - rows.q_NK).detach().abs()
        head_gap_N1 = torch.where(temperature_of_head(rows.log_p_NK, rows.p_NK, self.mu), gap_NK, 0.0).sum(
            -1, keepdim=True
        )
        total_N1 = gap_NK.sum(-1, keepdim=True)
        equal_N1 = total_N1 == 0
        head_N1 = torch.where(equal_N1, 0.5, head_gap_N1 / torch.where(equal_N1, 1.0, total_N1))
        log_ratio_NK = rows.log_q_NK - rows.log_p_NK
        reverse_NK, p_NK = (1 - head_N1) * rows.q_NK * log_ratio_NK, head_N1 * rows.p_NK
        return reverse_NK - p_NK * log_ratio_NK, reverse_NK - p_NK


def temperature_of_head(log_p_NK: Tensor, p_NK: Tensor, mass: float) -> Tensor:
    """The most likely tokens whose cumulated mass is at most `mass`, and always the first (bool).

    Instead of sorting the vocabulary it halves the interval that holds the threshold, until no two numbers of the
    working precision are left in it: exact, but for tokens of equal probability, which stay together.
    """
    top_N1 = log_p_NK.amax(-1, keepdim=True)
    within_N1 = torch.zeros_like(top_N1)
    beyond_N1 = torch.full_like(top_N1, -64.0)
    for _ in range(30 if log_p_NK.dtype == torch.float32 else 60):
        middle_N1 = (within_N1 + beyond_N1) / 2
        cumulated_N1 = torch.where(log_p_NK - top_N1 >= middle_N1, p_NK, 0.0).sum(-1, keepdim=True)
        fits_N1 = cumulated_N1 <= mass
        within_N1 = torch.where(fits_N1, middle_N1, within_N1)
        beyond_N1 = torch.where(fits_N1, beyond_N1, middle_N1)
    return log_p_NK - top_N1 >= within_N1


@dataclass(frozen=True, kw_only=True)
class TokenwiseKL(Divergence):
    """sum [w p log(p/q) + (1 - w) q log(q/p)] with w = p / (p + q), entry by entry, held constant.

    ToDi, arXiv 2505.16297: forward KL where the student is too low, reverse KL where it is too high.
    Limits: tau^2 D tends to the variance of the logit error at high temperature (its gradient to 3/2 of that of half
    of it, as the weights are constant).
    """

    name = "todi"

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        log_ratio_NK = rows.log_q_NK - rows.log_p_NK
        forward_NK = (-log_ratio_NK).sigmoid().detach()
        forward_p_NK, reverse_q_NK = forward_NK * rows.p_NK, (1 - forward_NK) * rows.q_NK
        return (reverse_q_NK - forward_p_NK) * log_ratio_NK, reverse_q_NK * (log_ratio_NK + 1) - forward_p_NK


@dataclass(frozen=True, kw_only=True)
class TailAwareKL(RowObjective):
    """Forward KL in two parts, the second weighed: KL over {top k, tail} + w P_tail KL(tail of p || tail of q).

    Tail-aware decomposition (TAD), arXiv 2602.20816. The paper takes w = beta over the mean tail mass of the sequence,
    with k = 10 and beta = 2: `per_sequence`.
    Limits: w = 1 is forward KL for every k, w = 0 the KL with a tail bucket.

    Attributes:
        k: tokens of the head: the teacher's most likely.
        tail_weight: w, not negative; a token option too.
        per_sequence: take w = tail_weight / (mean tail mass of the token's sequence). The fused loss measures it; plain
            functions need it as a token option, from `limbeck.objectives.tail_weights`.
    """

    name = "tad"
    supports = frozenset({"full"})
    token_fields = frozenset({"tail_weight"})

    k: int = 10
    tail_weight: float = 2.0
    per_sequence: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise LimbeckError(f"tad k={self.k}: expected at least one token")
        if not 0 <= self.tail_weight < math.inf:
            raise LimbeckError(f"tad tail_weight={self.tail_weight}: expected zero or more; 1 is forward KL")

    def sequence_options(self, signal: DenseSignal, sequence_N: Tensor) -> dict[str, Tensor]:
        """The weight of the tail, by the mean tail mass of each sequence."""
        # That module measures with the tiles of the fused loss, which is made of objectives.
        from limbeck.objectives.sequence.difficulty import tail_weights

        return {"tail_weight": tail_weights(signal, sequence_N, k=self.k, beta=self.tail_weight)}

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        weight = rows.option(self.name, "tail_weight", self.tail_weight)
        if self.per_sequence and not isinstance(weight, Tensor):
            raise LimbeckError(
                "tad per_sequence=True without the weights of the tokens: the fused loss measures them where tad "
                "stands by itself or once in a sum; else give token_options={'tail_weight': tail_weights(...)}"
            )
        tail_NK = tail_of(rows.log_p_NK, self.k)
        log_p_tail_N1, log_q_tail_N1 = (_log_mass(t, tail_NK) for t in (rows.log_p_NK, rows.log_q_NK))
        p_tail_N1 = log_p_tail_N1.exp()
        bucket_N1 = p_tail_N1 * (log_p_tail_N1 - log_q_tail_N1)
        counted_NK = torch.where(tail_NK, weight * rows.p_NK, rows.p_NK)
        value_N1 = (counted_NK * (rows.log_p_NK - rows.log_q_NK)).sum(-1, keepdim=True) + (1 - weight) * bucket_N1
        tail_q_NK = torch.where(tail_NK, (rows.log_q_NK - log_q_tail_N1).clamp_max(0.0).exp(), 0.0)
        slope_NK = -counted_NK - (1 - weight) * p_tail_N1 * tail_q_NK
        return value_N1.squeeze(-1), through_softmax(rows, slope_NK)


def tail_of(log_p_NK: Tensor, k: int) -> Tensor:
    """Everything below the k-th most likely token (bool)."""
    k = min(k, log_p_NK.shape[-1])
    return log_p_NK < log_p_NK.topk(k, dim=-1).values[:, -1:]


def _log_mass(log_p_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    return torch.where(chosen_NK, log_p_NK, LOG_ZERO).logsumexp(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class EntropyGate:
    """One objective everywhere, another where the teacher is unsure: its entropy at temperature 1 exceeds a threshold.

    EOPD, arXiv 2603.07079: reverse KL on the student's own responses, forward KL added at high-entropy tokens. "add"
    puts it on top (the released code), "switch" takes it instead (how the paper's text reads).
    Limits: a threshold above log V is `base` alone; below zero it is the sum, or `gated` alone.

    Attributes:
        base, gated: the two objectives.
        threshold: in nats.
        mode: "add" or "switch".
    """

    name = "eopd"
    order = None
    caution = ""

    base: Objective = field(default_factory=ReverseKL)
    gated: Objective = field(default_factory=ForwardKL)
    threshold: float = 0.8
    mode: GateMode = "add"

    def __post_init__(self) -> None:
        if self.mode not in get_args(GateMode):
            raise LimbeckError(f"eopd mode={self.mode!r}: expected one of {', '.join(get_args(GateMode))}")
        if math.isnan(self.threshold):
            raise LimbeckError("eopd threshold=nan: expected nats, such as 0.8")
        for where, inner in (("base", self.base), ("gated", self.gated)):
            if not isinstance(inner, Objective) or "hidden" in inner.reads:
                raise LimbeckError(
                    f"eopd {where}={inner.name!r}: expected a function of the two rows, such as fkl or rkl"
                )

    @property
    def reads(self) -> frozenset[str]:
        return self.base.reads | self.gated.reads | {"teacher"}

    @property
    def supports(self) -> frozenset[str]:
        # The entropy needs the whole row.
        return self.base.supports & self.gated.supports & {"full"}

    @property
    def token_fields(self) -> frozenset[str]:
        return self.base.token_fields | self.gated.token_fields

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        base_N, base_NK = scaled(self.base, rows)
        gated_N, gated_NK = scaled(self.gated, rows)
        log_p_NK = rows.teacher_logits_NK.log_softmax(-1).clamp_min(LOG_ZERO)
        unsure_N = (-(log_p_NK.exp() * log_p_NK).sum(-1) > self.threshold).to(base_N.dtype)
        kept_N = 1 - unsure_N if self.mode == "switch" else torch.ones_like(unsure_N)
        value_N = kept_N * base_N + unsure_N * gated_N
        return value_N, kept_N.unsqueeze(-1) * base_NK + unsure_N.unsqueeze(-1) * gated_NK
