"""Objectives as plain functions of two rows of logits, differentiable by autograd: for any loop, and the oracle."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from limbeck.objectives.base import Objective, Rows
from limbeck.objectives.divergences import ForwardKL, ReverseKL
from limbeck.objectives.logit_matching import CSD, Weighting
from limbeck.objectives.mixtures import JensenShannon, JSForm, SkewKL, SkewReverseKL
from limbeck.objectives.sums import AnyObjective, nested
from limbeck.objectives.temperature import Temperature, scaled
from limbeck.types import LimbeckError


def token_values(
    objective: AnyObjective,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    temperature: Temperature | float = 1.0,
    label_N: Tensor | None = None,
    token_options: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Value of each token (N,), the temperature's factor included, differentiable in the student's logits.

    Half-precision logits of both sides are lifted to float32 first. It holds the full logits, several times over:
    `fused_distillation_loss` is the same without them.

    Raises:
        LimbeckError: where the shapes disagree, or labels the objective reads are missing.
    """
    if student_logits_NV.dim() != 2 or student_logits_NV.shape != teacher_logits_NV.shape:
        raise LimbeckError(
            f"student logits {tuple(student_logits_NV.shape)}, teacher logits {tuple(teacher_logits_NV.shape)}: "
            "expected the same (N, V); flatten rows and cut padding slots first"
        )
    if not isinstance(objective, Objective) or "hidden" in objective.reads:
        raise LimbeckError(f"objective {objective.name!r} reads hidden states: use fused_distillation_loss")
    if "labels" in objective.reads and label_N is None:
        raise LimbeckError(
            f"objective {objective.name!r} reads labels: give label_N, the token that followed each position"
        )
    temperature = temperature if isinstance(temperature, Temperature) else Temperature(loss=temperature)
    for part in nested(objective):
        if isinstance(part, Objective):
            temperature.check(part)
    student_NV, teacher_NV = (t.float() if t.itemsize < 4 else t for t in (student_logits_NV, teacher_logits_NV))
    teacher_NV = teacher_NV.detach().to(student_NV.dtype)
    student_tau_N1, teacher_tau_N1 = temperature.columns(student_NV.shape[0], student_NV.dtype, student_NV.device)
    rows = Rows(
        student_logits_NK=student_NV,
        teacher_logits_NK=teacher_NV,
        student_tau_N1=student_tau_N1,
        teacher_tau_N1=teacher_tau_N1,
        scale=temperature.scale,
        label_N=label_N,
        token_options={name: option.to(student_NV.dtype) for name, option in (token_options or {}).items()},
    )
    value_N, _ = scaled(objective, rows)
    return value_N


def forward_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: Temperature | float = 1.0
) -> Tensor:
    """tau^2 KL(teacher || student) of each token. See `ForwardKL`."""
    return token_values(ForwardKL(), student_logits_NV, teacher_logits_NV, temperature=temperature)


def reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: Temperature | float = 1.0
) -> Tensor:
    """tau^2 KL(student || teacher) of each token. See `ReverseKL`."""
    return token_values(ReverseKL(), student_logits_NV, teacher_logits_NV, temperature=temperature)


def csd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    first: Weighting = "student",
    second: Weighting = "student",
    temperature: Temperature | float = 1.0,
) -> Tensor:
    """Concrete score distillation of each token, weights held constant. See `CSD`."""
    objective = CSD(first=first, second=second)
    return token_values(objective, student_logits_NV, teacher_logits_NV, temperature=temperature)


def jensen_shannon(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float = 0.5,
    form: JSForm = "gkd",
    temperature: Temperature | float = 1.0,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each token. See `JensenShannon`."""
    objective = JensenShannon(beta=beta, form=form)
    return token_values(objective, student_logits_NV, teacher_logits_NV, temperature=temperature)


def skew_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, alpha: float = 0.1, temperature: Temperature | float = 1.0
) -> Tensor:
    """KL(teacher || mixture) of each token. See `SkewKL`."""
    return token_values(SkewKL(alpha=alpha), student_logits_NV, teacher_logits_NV, temperature=temperature)


def skew_reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, alpha: float = 0.1, temperature: Temperature | float = 1.0
) -> Tensor:
    """KL(student || mixture) of each token. See `SkewReverseKL`."""
    return token_values(SkewReverseKL(alpha=alpha), student_logits_NV, teacher_logits_NV, temperature=temperature)
