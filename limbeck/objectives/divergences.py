"""Objectives that are functions of two probability rows: p, the teacher's, and q, the student's, both tempered.

Each gives, entry by entry, the terms of its value and its slope h = dD/d(log q); the softmax does the rest for all of
them: dD/ds = (h - q sum(h)) / tau. A multiple of q added to h changes nothing, so the slopes leave such parts out.
Whatever a method holds constant by definition is detached in the terms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from limbeck.objectives.base import Rows
from limbeck.types import LimbeckError

ANY_SUPPORT = frozenset({"full", "topk_renorm", "topk_tail"})
# Above this a ratio of probabilities stands still: e^60 times any vocabulary is still a float32.
LOG_RATIO_CAP = 60.0
# Closer to zero than this a power of the alpha-beta divergence is its limit.
AB_LIMIT = 1e-3


class RowObjective(ABC):
    """Base class of most objectives; see `limbeck.objectives.base.Objective`."""

    name: str
    order: int | None = 2
    reads: frozenset[str] = frozenset({"teacher"})
    supports: frozenset[str] = ANY_SUPPORT
    token_fields: frozenset[str] = frozenset()

    @property
    def caution(self) -> str:
        return ""

    @abstractmethod
    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]: ...


class Divergence(RowObjective):
    """A function of (p, q) given entry by entry."""

    @abstractmethod
    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Terms of the value and slopes in log q, both (N, K)."""

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        term_NK, slope_NK = self.pointwise(rows)
        return term_NK.sum(-1), through_softmax(rows, slope_NK)


def through_softmax(rows: Rows, slope_NK: Tensor) -> Tensor:
    """Gradient in the raw student logits from the slope in log q."""
    return (slope_NK - rows.q_NK * slope_NK.sum(-1, keepdim=True)) * rows.student_inv_tau_N1


def check_fraction(objective: str, option: str, value: float, closed: bool = False) -> None:
    """Refuse an option that is no fraction: inside (0, 1), or [0, 1] where `closed`."""
    inside = 0 <= value <= 1 if closed else 0 < value < 1
    if not inside:
        wanted = "[0, 1]" if closed else "(0, 1); the ends are objectives of their own (fkl, rkl)"
        raise LimbeckError(f"{objective} {option}={value}: expected a number in {wanted}")


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(p||q) = sum p log(p/q), with p the teacher: covers the teacher's modes. Gradient (q - p) / tau.

    Hinton et al. 2015 (arXiv 1503.02531). On a sample of the teacher it is the unbiased estimate of RS-KD
    (arXiv 2503.16870), which may be negative.
    Limits: tau^2 KL tends to half the variance of the logit error over the vocabulary at high temperature.
    """

    name = "fkl"
    supports = ANY_SUPPORT | {"sampled"}

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.p_NK * (rows.log_p_NK - rows.log_q_NK), -rows.p_NK


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(q||p) = sum q log(q/p), with q the student: seeks the teacher's modes. Gradient q (log(q/p) - KL) / tau.

    MiniLLM (arXiv 2306.08543) minimises it on sequences; here it is per token. tau^2 times it has exactly half the
    gradient of CSD with student weights.
    Limits: tau^2 KL tends to half the variance of the logit error over the vocabulary at high temperature.
    """

    name = "rkl"

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        term_NK = rows.q_NK * (rows.log_q_NK - rows.log_p_NK)
        return term_NK, term_NK


@dataclass(frozen=True, kw_only=True)
class SymmetricKL(Divergence):
    """w KL(p||q) + (1 - w) KL(q||p), the mix of both directions on the same tokens.

    The weighted KL of the CSD code base (w = 0.1 there; arXiv 2509.25837, table 1).
    Limits: w = 1 is forward, w = 0 reverse KL; tau^2 D tends to half the variance of the logit error.

    Attributes:
        forward: w, the weight of the forward direction, in [0, 1].
    """

    name = "symmetric_kl"
    token_fields = frozenset({"forward"})

    forward: float = 0.5

    def __post_init__(self) -> None:
        check_fraction(self.name, "forward", self.forward, closed=True)

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        forward = rows.option(self.name, "forward", self.forward)
        log_ratio_NK = rows.log_q_NK - rows.log_p_NK
        reverse_NK = (1 - forward) * rows.q_NK * log_ratio_NK
        return reverse_NK - forward * rows.p_NK * log_ratio_NK, reverse_NK - forward * rows.p_NK


@dataclass(frozen=True, kw_only=True)
class Jeffreys(Divergence):
    """KL(p||q) + KL(q||p) = sum (q - p) log(q/p), twice the symmetric KL.

    Jeffreys 1946. tau^2 J is the integral of the variance of the logit error along the path from p to q.
    Limits: tau^2 J tends to the variance of the logit error over the vocabulary at high temperature.
    """

    name = "jeffreys"

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        log_ratio_NK = rows.log_q_NK - rows.log_p_NK
        return (rows.q_NK - rows.p_NK) * log_ratio_NK, rows.q_NK * log_ratio_NK - rows.p_NK


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """1/2 sum |p - q|, in [0, 1]. Gradient J_q sign(q - p) / (2 tau), almost everywhere.

    f-distillation, Wen et al. 2023 (arXiv 2307.15190). Every entry of its gradient is at most q: no signal reaches
    tokens the student finds unlikely.
    Limits: of first order, tau TV tends to half the mean absolute centred logit error; tau^2 TV diverges.
    """

    name = "tv"
    order = 1

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        gap_NK = rows.q_NK - rows.p_NK
        return gap_NK.abs() / 2, rows.q_NK * gap_NK.sign() / 2


@dataclass(frozen=True, kw_only=True)
class AlphaBeta(Divergence):
    """-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]. Slope q^b (q^a - p^a) / a.

    ABKD, arXiv 2505.04560 (divergence of Cichocki et al. 2011). a decides how much hard tokens weigh, b how much
    confident ones do.
    Limits: (1, 0) forward KL, (0, 1) reverse KL, (.5, .5) four times one minus Bhattacharyya, (1, 1) half the squared
    error; a = 0, b = 0 and a + b = 0 by their own formulas. Only a + b = 1 keeps its size over temperatures and
    vocabularies. With negative powers a ratio of probabilities counts as e^60 at most. A power, or a sum of both,
    within 0.001 of zero is taken as zero: the quotient would be lost in float32.

    Attributes:
        alpha, beta: the powers a and b.
    """

    name = "ab"

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        for option in ("alpha", "beta"):
            if not math.isfinite(getattr(self, option)):
                raise LimbeckError(
                    f"ab {option}={getattr(self, option)}: expected a finite number, such as 0.2 and 0.7"
                )

    @property
    def caution(self) -> str:
        if math.isclose(self.alpha + self.beta, 1.0):
            return ""
        total = self.alpha + self.beta
        return f"ab with alpha + beta = {total:g} changes its size with tau and vocabulary: use a sum of 1"

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        a, b = (0.0 if abs(power_) < AB_LIMIT else power_ for power_ in (self.alpha, self.beta))
        b = -a if abs(a + b) < AB_LIMIT else b
        log_p_NK, log_q_NK = rows.log_p_NK, rows.log_q_NK
        if a == 0 and b == 0:
            gap_NK = log_q_NK - log_p_NK
            return gap_NK * gap_NK / 2, gap_NK
        if a + b == 0:
            ratio_NK = power(a * (log_p_NK - log_q_NK))
            return (a * (log_q_NK - log_p_NK) + ratio_NK - 1) / a**2, (1 - ratio_NK) / a
        q_ab_NK = power((a + b) * log_q_NK)
        if a == 0:
            p_b_NK = power(b * log_p_NK)
            log_NK = log_q_NK - log_p_NK
            return (b * q_ab_NK * log_NK - q_ab_NK + p_b_NK) / b**2, q_ab_NK * log_NK
        cross_NK = power(a * log_p_NK + b * log_q_NK)
        slope_NK = (q_ab_NK - cross_NK) / a
        p_ab_NK = power((a + b) * log_p_NK)
        if b == 0:
            return (a * p_ab_NK * (log_p_NK - log_q_NK) - p_ab_NK + q_ab_NK) / a**2, slope_NK
        return (a * p_ab_NK + b * q_ab_NK - (a + b) * cross_NK) / (a * b * (a + b)), slope_NK


def power(exponent_NK: Tensor) -> Tensor:
    """exp, standing still above e^60: finite where a ratio of probabilities is not."""
    return exponent_NK.clamp_max(LOG_RATIO_CAP).exp()
