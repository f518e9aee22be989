"""The objective of drafts: the chance that a token drawn from the student stands in speculative decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.objectives.base import Rows
from limbeck.objectives.divergences import ForwardKL, RowObjective, TotalVariation, through_softmax
from limbeck.objectives.temperature import scaled
from limbeck.types import LimbeckError

LKForm = Literal["alpha", "lambda"]


@dataclass(frozen=True, kw_only=True)
class LK(RowObjective):
    """-log a with a = sum min(p, q), the share of the student's drafts that the teacher keeps: 1 - total variation.

    LK losses, arXiv 2602.23881. "alpha": -log a, whose gradient is total variation's over a: it does not vanish where
    the two rows hardly overlap, and on a teacher without doubt it is cross-entropy. "lambda": l KL(p||q) + (1 - l)
    (1 - a) with l = exp(-eta a), held constant. The paper takes one l for a batch and position of the draft, from the
    mean of a; here each token has its own. A KL of a fixed weight beside it is a `sum`.
    Limits: of first order, as tv, to which "alpha" tends near equality; on a top-k support with a tail a is at least
    the full one. In "lambda" each part has the factor of its own order; eta = 0 is forward KL.

    Attributes:
        form: "alpha" or "lambda".
        eta: how fast "lambda" goes from the KL to total variation as a grows; 3 in the paper.
    """

    name = "lk"

    form: LKForm = "alpha"
    eta: float = 3.0

    def __post_init__(self) -> None:
        if self.form not in get_args(LKForm):
            raise LimbeckError(f"lk form={self.form!r}: expected one of {', '.join(get_args(LKForm))}")
        if not 0 <= self.eta < math.inf:
            raise LimbeckError(f"lk eta={self.eta}: expected zero or more; 3 is the paper's, 0 is forward KL")

    @property
    def order(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1 if self.form == "alpha" else None

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return _log_acceptance(rows) if self.form == "alpha" else self._blended(rows)

    def _blended(self, rows: Rows) -> tuple[Tensor, Tensor]:
        acceptance_N = torch.minimum(rows.p_NK, rows.q_NK).sum(-1).detach()
        kl_N = (-self.eta * acceptance_N).exp()
        forward_N, forward_NK = scaled(ForwardKL(), rows)
        missed_N, missed_NK = scaled(TotalVariation(), rows)
        value_N = kl_N * forward_N + (1 - kl_N) * missed_N
        return value_N, kl_N.unsqueeze(-1) * forward_NK + (1 - kl_N).unsqueeze(-1) * missed_NK


def _log_acceptance(rows: Rows) -> tuple[Tensor, Tensor]:
    """-log sum min(p, q), from the logarithms: rows without a token in common still have a value and a gradient."""
    log_overlap_NK = torch.minimum(rows.log_p_NK, rows.log_q_NK)
    log_a_N1 = log_overlap_NK.logsumexp(-1, keepdim=True)
    # Of an entry where the two are equal half counts, as in the derivative of the minimum.
    students_NK = (1 - (rows.log_q_NK - rows.log_p_NK).sign()) / 2
    slope_NK = -students_NK * (log_overlap_NK - log_a_N1).exp()
    return -log_a_N1.squeeze(-1), through_softmax(rows, slope_NK)
