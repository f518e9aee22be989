"""Objectives on the raw logits: concrete score distillation and logit matching. Their residuals are never tempered."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.objectives.base import Objective, Rows
from limbeck.objectives.divergences import ForwardKL, RowObjective, check_fraction
from limbeck.objectives.fused.normalization import Normalization, normalize
from limbeck.types import LimbeckError

Weighting = Literal["student", "teacher", "uniform", "mixture"]


@dataclass(frozen=True, kw_only=True)
class CSD(RowObjective):
    """1/2 sum_xy w1(y) w2(x) (d_x - d_y)^2 with d = student logits - teacher logits, in linear time.

    Concrete score distillation, arXiv 2509.25837, eq. 8 and theorem 3. With normalised weights, held constant:
    1/2 [E_w1 d^2 + E_w2 d^2] - E_w1 d E_w2 d, gradient w2 (d - E_w1 d) + w1 (d - E_w2 d). The temperature softens the
    weights only, so the neutral factor is 1. Entries impossible for either model are left out. The released code takes
    half of this gradient. A low-rank sum of pairs is a weighted sum of these.
    Limits: student-student has exactly twice the gradient of (tau^2 times) reverse KL; uniform-uniform is the mean
    squared error of centred logits; teacher-teacher is twice forward KL to second order. Only a uniform slot sees the
    tail.

    Attributes:
        first, second: who weighs the pairs: the student's q, the teacher's p (both at the temperature), uniform over
            the real tokens, or the mixture share p + (1 - share) q. The order does not matter.
        share: the teacher's share of "mixture", in [0, 1] (0.15 in the paper's summarisation runs).
        detach: hold the weights constant, as the authors do; else the gradient flows through them too.
    """

    name = "csd"
    order = 0
    supports = frozenset({"full", "topk_renorm"})

    first: Weighting = "student"
    second: Weighting = "student"
    share: float = 0.15
    detach: bool = True

    def __post_init__(self) -> None:
        _check_weighting("csd first", self.first)
        _check_weighting("csd second", self.second)
        check_fraction(self.name, "share", self.share, closed=True)

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        possible_NK = possible_entries(rows)
        d_NK = torch.where(possible_NK, rows.student_logits_NK - rows.teacher_logits_NK, 0.0)
        first_NK = self._weight(rows, self.first, possible_NK)
        second_NK = first_NK if self.first == self.second else self._weight(rows, self.second, possible_NK)
        from_first_NK = d_NK - (first_NK * d_NK).sum(-1, keepdim=True)
        from_second_NK = d_NK - (second_NK * d_NK).sum(-1, keepdim=True)
        # Centred by the first weight's mean the cross term is zero; w * c first, so that 0 * inf^2 cannot arise.
        value_N = ((first_NK + second_NK) * from_first_NK * from_first_NK).sum(-1) / 2
        grad_NK = second_NK * from_first_NK + first_NK * from_second_NK
        if not self.detach:
            grad_NK = grad_NK + self._through_weights(rows, possible_NK, from_first_NK, from_second_NK)
        return value_N, grad_NK

    def _weight(self, rows: Rows, weighting: Weighting, possible_NK: Tensor) -> Tensor:
        weight_NK = pair_weight(rows, weighting, possible_NK, self.share)
        return weight_NK.detach() if self.detach else weight_NK

    def _through_weights(
        self, rows: Rows, possible_NK: Tensor, from_first_NK: Tensor, from_second_NK: Tensor
    ) -> Tensor:
        """The gradient that reaches the student through its part of the weights."""
        moving = {"student": 1.0, "mixture": 1 - self.share}
        first, second = moving.get(self.first, 0.0), moving.get(self.second, 0.0)
        q_NK = pair_weight(rows, "student", possible_NK, self.share)
        slope_NK = q_NK * (first * from_second_NK * from_second_NK + second * from_first_NK * from_first_NK) / 2
        return (slope_NK - q_NK * slope_NK.sum(-1, keepdim=True)) / rows.student_tau_N1


def possible_entries(rows: Rows) -> Tensor:
    """Entries that are possible for both models (bool)."""
    return torch.isfinite(rows.student_logits_NK) & torch.isfinite(rows.teacher_logits_NK)


def pair_weight(rows: Rows, weighting: Weighting, possible_NK: Tensor, share: float) -> Tensor:
    """A weight over the possible entries: uniform, or a softmax of the rows over just these. It sums to one, or to zero
    where no entry is possible."""
    if weighting == "uniform":
        weight_NK = possible_NK.to(rows.student_logits_NK.dtype)
        return weight_NK / weight_NK.sum(-1, keepdim=True).clamp_min(1.0)
    if weighting == "mixture":
        teacher_NK = pair_weight(rows, "teacher", possible_NK, share)
        return share * teacher_NK + (1 - share) * pair_weight(rows, "student", possible_NK, share)
    logits_NK, cooling_N1 = rows.student_logits_NK, rows.student_inv_tau_N1
    if weighting == "teacher":
        logits_NK, cooling_N1 = rows.teacher_logits_NK, rows.teacher_inv_tau_N1
    weight_NK = torch.where(possible_NK, logits_NK * cooling_N1, -torch.inf).softmax(-1)
    # Rows without a possible entry have no weights, where softmax says NaN.
    return torch.where(possible_NK, weight_NK, 0.0)


def _check_weighting(where: str, weighting: str) -> None:
    if weighting not in get_args(Weighting):
        raise LimbeckError(f"{where}={weighting!r}: expected one of {', '.join(get_args(Weighting))}")


@dataclass(frozen=True, kw_only=True)
class DirectLogit(RowObjective):
    """1/2 sum w d^2 with d the difference of (normalised) logits and w a weight held constant.

    Direct logit distillation (DLD), the ablation of arXiv 2509.25837, table 5 (its code takes half of this). Unlike CSD
    and the divergences it is not invariant to a shift of the logits, unless `normalize` makes it so.
    Limits: uniform weights on mean-centred logits are half of CSD with uniform-uniform weights.

    Attributes:
        weighting: as in `CSD`; tempered.
        normalize: of both rows before the difference: "none", "mean", "min", "max", "std" (z-score), "range" ([-1, 1]).
        share: the teacher's share of "mixture".
    """

    name = "dld"
    order = 0
    supports = frozenset({"full"})

    weighting: Weighting = "uniform"
    normalize: Normalization = "mean"
    share: float = 0.15

    def __post_init__(self) -> None:
        _check_weighting("dld weighting", self.weighting)
        if self.normalize not in get_args(Normalization):
            raise LimbeckError(
                f"dld normalize={self.normalize!r}: expected one of {', '.join(get_args(Normalization))}"
            )
        check_fraction(self.name, "share", self.share, closed=True)

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        possible_NK = possible_entries(rows)
        student = normalize(rows.student_logits_NK, possible_NK, self.normalize)
        teacher = normalize(rows.teacher_logits_NK, possible_NK, self.normalize)
        d_NK = student.logits_NK - teacher.logits_NK
        weighted_NK = pair_weight(rows, self.weighting, possible_NK, self.share).detach() * d_NK
        return (weighted_NK * d_NK).sum(-1) / 2, student.back(weighted_NK)


@dataclass(frozen=True, kw_only=True)
class LogitStandardization:
    """Another objective after both rows became z-scores: (logits - mean) / standard deviation over the vocabulary.

    LSKD, arXiv 2403.01427 (there with tau 2 to 4 and a deviation of n - 1, here of n). The loss ignores scale and shift
    of either row, so the student's own scale gets no gradient: never the only loss; cross-entropy sets calibration.
    Limits: with a KL, tau^2 D tends to one minus the Pearson correlation of the logits.

    Attributes:
        inner: what compares the standardised rows.
    """

    name = "lskd"
    reads = frozenset({"teacher"})
    supports = frozenset({"full"})

    inner: Objective = field(default_factory=ForwardKL)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Objective) or self.inner.reads != self.reads:
            raise LimbeckError(
                f"lskd inner={self.inner.name!r}: expected a function of the two rows, such as fkl or rkl"
            )

    @property
    def order(self) -> int | None:
        return self.inner.order

    @property
    def token_fields(self) -> frozenset[str]:
        return self.inner.token_fields

    @property
    def caution(self) -> str:
        return ""

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        student = normalize(rows.student_logits_NK, torch.isfinite(rows.student_logits_NK), "std")
        teacher = normalize(rows.teacher_logits_NK, torch.isfinite(rows.teacher_logits_NK), "std")
        inner_rows = replace(
            rows,
            student_logits_NK=torch.where(student.possible_NK, student.logits_NK, -torch.inf),
            teacher_logits_NK=torch.where(teacher.possible_NK, teacher.logits_NK, -torch.inf),
        )
        value_N, grad_NK = self.inner.value_and_grad(inner_rows)
        return value_N, student.back(grad_NK)
