"""Objectives that push the sampled token alone: by how the two models differ on it, or by an advantage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.objectives.base import Rows
from limbeck.objectives.divergences import ANY_SUPPORT, RowObjective, through_softmax
from limbeck.objectives.sums import CrossEntropy, labels_of
from limbeck.types import LimbeckError

# Of log(p/q) in an exponential, as verl bounds it: a token that the student drew and hardly could.
LARGEST_K3 = 20.0


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL(RowObjective):
    """log(q(y)/p(y)) of the token y that was sampled, signed; gradient log(q(y)/p(y)) (onehot(y) - q) / tau.

    On-policy distillation as reinforcement learning: loss -A log q(y), the advantage A = log p(y) - log q(y) held
    constant and of this token alone, a discount of 0 (Lu and Thinking Machines Lab, "On-Policy Distillation", 2025).
    Labels of -100 count as zero.
    Limits: unbiased for reverse KL's gradient only on responses sampled from the student itself at the same
    temperature, nothing cut off (top_p 1): then value and gradient are those of `rkl` at each token on average. On any
    other response they estimate nothing. `rkl` has no variance, at the same cost where the teacher's whole row is read.

    Attributes:
        estimator: with d = log(q(y)/p(y)) (Schulman, "Approximating KL Divergence", 2020) "k1" has the value d and
            pushes by d; "k2" has d^2 / 2, never negative, and the same gradient; "k3" has exp(-d) - 1 + d, never
            negative and on average reverse KL too, but the gradient of that is 1 - exp(-d) in the place of d: on
            average forward KL's. Its -d is at most 20.
        clip: the push stays within plus and minus this, the value does not; 0 is off.
    """

    name = "opd"
    reads = frozenset({"teacher", "labels"})
    supports = frozenset({"full"})

    estimator: Literal["k1", "k2", "k3"] = "k1"
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.estimator not in ("k1", "k2", "k3"):
            raise LimbeckError(f"opd estimator={self.estimator!r}: expected k1, k2 or k3")
        if not 0 <= self.clip < math.inf:
            raise LimbeckError(f"opd clip={self.clip}: expected zero (off) or more, in nats, such as 5")

    @property
    def caution(self) -> str:
        return "opd is unbiased only on responses sampled at the temperature of the loss: sample at it, or use rkl"

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        counts_N1, label_N1, at_label_NV = labels_of(rows)
        log_q_N1 = rows.log_q_NK.gather(-1, label_N1)
        gap_N1 = torch.where(counts_N1, log_q_N1 - rows.log_p_NK.gather(-1, label_N1), 0.0).detach()
        estimate_N1, push_N1 = self._estimate(gap_N1)
        push_N1 = push_N1.clamp(-self.clip, self.clip) if self.clip else push_N1
        # The second term is zero and carries the gradient.
        value_N1 = estimate_N1 + push_N1 * (log_q_N1 - log_q_N1.detach())
        return value_N1.squeeze(-1), through_softmax(rows, push_N1 * at_label_NV)

    def _estimate(self, gap_N1: Tensor) -> tuple[Tensor, Tensor]:
        """Value and push of log(q/p) of each token."""
        if self.estimator == "k1":
            return gap_N1, gap_N1
        if self.estimator == "k2":
            return gap_N1**2 / 2, gap_N1
        ratio_less_1_N1 = (-gap_N1).clamp_max(LARGEST_K3).expm1()
        return ratio_less_1_N1 + gap_N1, -ratio_less_1_N1


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(RowObjective):
    """-A log q(y) at temperature 1, y the token that followed and A its advantage, a constant of either sign.

    REINFORCE (Williams 1992): the long-term part of MiniLLM (arXiv 2306.08543) with the advantage of
    `minillm_advantage`, DPKD (arXiv 2406.19774) with that of `dpkd_advantage`. Like cross-entropy it reads no teacher
    and sees the student's whole row; temperature and factor do not touch it. Labels of -100 count as zero.
    Limits: A = 1 is cross-entropy; A < 0 pushes a token away, without bound.

    Attributes:
        advantage: A, finite; a token option too, which is how it is meant to be given.
    """

    name = "policy_gradient"
    order = None
    reads = frozenset({"labels"})
    supports = ANY_SUPPORT | {"sampled"}
    token_fields = frozenset({"advantage"})

    advantage: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.advantage):
            raise LimbeckError(
                f"policy_gradient advantage={self.advantage}: expected a finite number; 1 is cross-entropy"
            )

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        surprise_N, grad_NV = CrossEntropy().value_and_grad(rows)
        advantage = rows.option(self.name, "advantage", self.advantage)
        by_token = advantage.squeeze(-1) if isinstance(advantage, Tensor) else advantage
        # An impossible token has an infinite surprise, and may still have no say.
        value_N = surprise_N.clamp_max(torch.finfo(surprise_N.dtype).max) * by_token
        return value_N, advantage * grad_NV
