"""Divergences through a mixture of teacher and student: Jensen-Shannon, skew KLs, and the assistants between the two.

The mixture's logarithm comes from the two logarithms, never from a sum of rounded probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.objectives.base import Rows
from limbeck.objectives.divergences import Divergence, check_fraction, power
from limbeck.types import LimbeckError

JSForm = Literal["gkd", "endpoint", "normalized"]
Assisted = Literal["teacher_assistant", "student_assistant", "assistant_teacher", "assistant_student"]


def log_mixture(log_p_NK: Tensor, log_q_NK: Tensor, share: Tensor | float) -> Tensor:
    """log(share p + (1 - share) q)."""
    if isinstance(share, Tensor):
        return torch.logaddexp(share.log() + log_p_NK, (-share).log1p() + log_q_NK)
    if share in (0.0, 1.0):
        return log_p_NK if share == 1.0 else log_q_NK
    return torch.logaddexp(math.log(share) + log_p_NK, math.log1p(-share) + log_q_NK)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence, M = b p + (1 - b) q, in one of three conventions.

    "gkd": b KL(p||M) + (1 - b) KL(q||M) (GKD, arXiv 2306.13649, eq. 1; TRL, Liger). It vanishes at both ends, as b KL
    and (1 - b) KL: b near 0 or 1 is a learning-rate knob there. "normalized": the same over b (1 - b), which tends to
    forward KL at 0 and reverse KL at 1. "endpoint": (1 - b) KL(p||M) + b KL(q||M) (ms-swift), forward KL at 0, reverse
    KL at 1, equal to "gkd" at 1/2. In all of them b weighs the teacher in M.
    Limits of tau^2 D over the variance of the logit error: b (1 - b) / 2, 1/2, ((1 - b)^3 + b^3) / 2.

    Attributes:
        beta: b, in (0, 1); the ends are allowed for "endpoint".
        form: the convention.
    """

    name = "js"
    token_fields = frozenset({"beta"})

    beta: float = 0.5
    form: JSForm = "gkd"

    def __post_init__(self) -> None:
        if self.form not in get_args(JSForm):
            raise LimbeckError(f"js form={self.form!r}: expected one of {', '.join(get_args(JSForm))}")
        check_fraction(self.name, "beta", self.beta, closed=self.form == "endpoint")

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        beta = rows.option(self.name, "beta", self.beta)
        log_m_NK = log_mixture(rows.log_p_NK, rows.log_q_NK, beta)
        p_term_NK = rows.p_NK * (rows.log_p_NK - log_m_NK)
        q_term_NK = rows.q_NK * (rows.log_q_NK - log_m_NK)
        if self.form == "endpoint":
            # d/d(log q) of the mixture itself: q over M, bounded by 1 / (1 - b).
            through_NK = (1 - beta) * ((1 - beta) * rows.p_NK + beta * rows.q_NK) * power(rows.log_q_NK - log_m_NK)
            return (1 - beta) * p_term_NK + beta * q_term_NK, beta * q_term_NK - through_NK
        size = beta * (1 - beta) if self.form == "normalized" else 1.0
        slope_NK = (1 - beta) * q_term_NK
        return (beta * p_term_NK + slope_NK) / size, slope_NK / size


@dataclass(frozen=True, kw_only=True)
class SkewKL(Divergence):
    """KL(p || a p + (1 - a) q), bounded by log(1/a). Gradient -(1 - a) J_q(p / m) / tau.

    DistiLLM, arXiv 2402.03898, eq. 4; the teacher-response half of DistiLLM-2 (arXiv 2503.07067).
    Limits: a -> 0 is forward KL, a -> 1 is zero; tau^2 D tends to (1 - a)^2 / 2 times the variance of the logit error.

    Attributes:
        alpha: a, the teacher's share of the mixture, in (0, 1); a token option too.
    """

    name = "skl"
    token_fields = frozenset({"alpha"})

    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_fraction(self.name, "alpha", self.alpha)

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        alpha = rows.option(self.name, "alpha", self.alpha)
        log_m_NK = log_mixture(rows.log_p_NK, rows.log_q_NK, alpha)
        slope_NK = (alpha - 1) * rows.p_NK * power(rows.log_q_NK - log_m_NK)
        return rows.p_NK * (rows.log_p_NK - log_m_NK), slope_NK


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(Divergence):
    """KL(q || (1 - a) p + a q), bounded by log(1/a). Gradient J_q(log(q/m) - a q/m) / tau.

    DistiLLM, arXiv 2402.03898, eq. 5; the student-response half of DistiLLM-2 (arXiv 2503.07067), whose released code
    holds the student inside the mixture constant: nearly the same direction, 1 / (1 - a) times the size
    near equality and more where the rows differ.
    Limits: a -> 0 is reverse KL, a -> 1 is zero; tau^2 D tends to (1 - a)^2 / 2 times the variance of the logit error.

    Attributes:
        alpha: a, the student's share of the mixture, in (0, 1); a token option too.
        detach_mixture: leave out the gradient through the mixture.
    """

    name = "srkl"
    token_fields = frozenset({"alpha"})

    alpha: float = 0.1
    detach_mixture: bool = False

    def __post_init__(self) -> None:
        check_fraction(self.name, "alpha", self.alpha)

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        alpha = rows.option(self.name, "alpha", self.alpha)
        inner_NK = rows.log_q_NK.detach() if self.detach_mixture else rows.log_q_NK
        log_ratio_NK = rows.log_q_NK - log_mixture(rows.log_p_NK, inner_NK, 1 - alpha)
        term_NK = rows.q_NK * log_ratio_NK
        if self.detach_mixture:
            return term_NK, term_NK
        return term_NK, term_NK - alpha * rows.q_NK * power(log_ratio_NK)


@dataclass(frozen=True, kw_only=True)
class AlphaMixture(Divergence):
    """KL between the teacher or the student and an assistant r between them, a generalised mean of the two.

    r ~ [l p^c + (1 - l) q^c]^(1/c) with c = (1 - a)/2, and r ~ p^l q^(1 - l) at a = 1, normalised over the vocabulary.

    AMiD, arXiv 2510.15982 (its KL member). a = -1 is the arithmetic mean (skew KLs), 1 the geometric, 3 the harmonic:
    the definition, where the authors' code takes the geometric mean for every a >= 1.
    Limits: "teacher_assistant" at a = -1 is skew KL with alpha = l; tau^2 KL(p||r) tends to (1 - l)^2 / 2 times the
    variance of the logit error. "assistant_student" with a detached assistant is a moving target (TAID).

    Attributes:
        alpha: a, the kind of mean.
        share: l, the teacher's share, in (0, 1); a token option too.
        between: which KL: (p||r), (q||r), (r||p), (r||q).
        detach_assistant: hold r constant.
    """

    name = "amid"
    token_fields = frozenset({"share"})

    alpha: float = -1.0
    share: float = 0.1
    between: Assisted = "teacher_assistant"
    detach_assistant: bool = False

    def __post_init__(self) -> None:
        check_fraction(self.name, "share", self.share)
        if not math.isfinite(self.alpha):
            raise LimbeckError(f"amid alpha={self.alpha}: expected a finite number, such as -1 or 0.5")
        if self.between not in get_args(Assisted):
            raise LimbeckError(f"amid between={self.between!r}: expected one of {', '.join(get_args(Assisted))}")
        if self.detach_assistant and not self.between.endswith("student") and not self.between.startswith("student"):
            raise LimbeckError(
                f"amid between={self.between!r} with a detached assistant has no gradient: let it through"
            )

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        share = rows.option(self.name, "share", self.share)
        log_q_NK = rows.log_q_NK.detach() if self.detach_assistant else rows.log_q_NK
        log_r_NK, student_share_NK = assistant(rows.log_p_NK, log_q_NK, share, self.alpha)
        r_NK = log_r_NK.exp()
        left, _, right = self.between.partition("_")
        logs = {"teacher": rows.log_p_NK, "student": rows.log_q_NK, "assistant": log_r_NK}
        probabilities = {"teacher": rows.p_NK, "student": rows.q_NK, "assistant": r_NK}
        term_NK = probabilities[left] * (logs[left] - logs[right])
        if right == "assistant":
            direct_NK = term_NK if left == "student" else torch.zeros_like(term_NK)
            in_r_NK = r_NK - probabilities[left]
        else:
            direct_NK = -r_NK if right == "student" else torch.zeros_like(term_NK)
            in_r_NK = term_NK - r_NK * term_NK.sum(-1, keepdim=True)
        return term_NK, direct_NK if self.detach_assistant else direct_NK + student_share_NK * in_r_NK


def assistant(log_p_NK: Tensor, log_q_NK: Tensor, share: Tensor | float, alpha: float) -> tuple[Tensor, Tensor]:
    """log r, and the derivative of its logarithm before normalisation in log q: the student's share of the mean."""
    half = (1 - alpha) / 2
    if abs(half) < 1e-9:
        mean_NK = share * log_p_NK + (1 - share) * log_q_NK
        return mean_NK.log_softmax(-1), torch.ones_like(mean_NK) * (1 - share)
    sum_NK = log_mixture(half * log_p_NK, half * log_q_NK, share)
    log_student = (-share).log1p() if isinstance(share, Tensor) else math.log1p(-share)
    return (sum_NK / half).log_softmax(-1), (log_student + half * log_q_NK - sum_NK).exp()


@dataclass(frozen=True, kw_only=True)
class TAID(Divergence):
    """KL(r || q) with r ~ p^t q^(1 - t), r held constant: a target that moves from the student to the teacher.

    TAID, arXiv 2501.16937: the assistant interpolates the logits. Gradient (q - r) / tau. t moves in a line from about
    0.4 to 1: in a recipe ``schedule: {progress: [0.4, 1.0]}``, in Python a token option. The paper's t is the larger of
    that line and of an adaptive update, with momentum, by how fast the loss falls: that update is not here.
    Limits: t = 1 is forward KL; tau^2 D tends to t^2 / 2 times the variance of the logit error.

    Attributes:
        progress: t, in (0, 1]; a token option too.
    """

    name = "taid"
    token_fields = frozenset({"progress"})

    progress: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.progress <= 1:
            raise LimbeckError(
                f"taid progress={self.progress}: expected a number in (0, 1]; at 0 the target is the student"
            )

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        progress = rows.option(self.name, "progress", self.progress)
        log_r_NK, _ = assistant(rows.log_p_NK, rows.log_q_NK.detach(), progress, 1.0)
        r_NK = log_r_NK.exp()
        return r_NK * (log_r_NK - rows.log_q_NK), -r_NK
