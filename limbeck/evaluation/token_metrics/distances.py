"""Distances of two next-token distributions from a block of logits, in few passes over the vocabulary.

The naive line is a log-softmax on each side and one sum over the vocabulary for every distance. Here one pass finds the
largest logits, one takes the exponentials and the sums that need no normaliser, and one the two sums that do:

    s, t                  logits less the largest of the row
    S = sum e^s           T = sum e^t
    H(q) = log S - sum e^s s / S
    KL(p || q) = sum e^t (t - s) / T + log S - log T
    JS(p, q) = 1/2 sum (p + q) log(1 + |p - q| / (p + q)) - min(p, q) |log p - log q|

The summands of KL and JS are zero where p = q, so that equal models are at a distance of exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.evaluation.token_metrics.likeliest import group_maxima

# What the body gives of every token, in this order. `student_log_z` is the log of S: the negative log-probability of
# the student's likeliest token.
DISTANCES: tuple[str, ...] = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "student_entropy",
    "teacher_entropy",
    "student_nll",
    "teacher_nll",
    "student_log_z",
    "teacher_log_z",
)

# Smaller than any sum of two probabilities that counts: keeps 0 / 0 out.
_TINY = 1e-37


@dataclass(frozen=True)
class Distances:
    """The body for `limbeck.objectives.fused.body.run_body`: reads `student`, `teacher` (N, V) and `label` (N,).

    It leaves the maxima for `likeliest` in `student_maxima` and `teacher_maxima` (N, groups).
    """

    def __call__(self, block: dict[str, Tensor], kept: list[Tensor] | None = None) -> Tensor:
        """The values of `DISTANCES`, (distances, N), in the dtype of the logits."""
        del kept
        raw_s_NV, raw_t_NV, label_N1 = block["student"], block["teacher"], block["label"][:, None]
        maxima_s_NG, maxima_t_NG = group_maxima(raw_s_NV), group_maxima(raw_t_NV)
        s_NV, t_NV = raw_s_NV - maxima_s_NG.amax(-1, keepdim=True), raw_t_NV - maxima_t_NG.amax(-1, keepdim=True)
        exp_s_NV, exp_t_NV, gap_NV = s_NV.exp(), t_NV.exp(), t_NV - s_NV
        S_N, T_N = exp_s_NV.sum(-1), exp_t_NV.sum(-1)
        log_S_N, log_T_N = S_N.log(), T_N.log()
        shift_N = log_S_N - log_T_N
        forward_N = (exp_t_NV * gap_NV).sum(-1) / T_N + shift_N
        reverse_N = -((exp_s_NV * gap_NV).sum(-1) / S_N + shift_N)
        entropy_s_N = log_S_N - (exp_s_NV * s_NV).sum(-1) / S_N
        entropy_t_N = log_T_N - (exp_t_NV * t_NV).sum(-1) / T_N
        q_NV, p_NV = exp_s_NV * (1 / S_N)[:, None], exp_t_NV * (1 / T_N)[:, None]
        apart_NV, both_NV = (p_NV - q_NV).abs(), p_NV + q_NV
        lean_NV = (apart_NV / both_NV.clamp_min(_TINY)).log1p()
        shannon_NV = both_NV * lean_NV - torch.minimum(p_NV, q_NV) * (gap_NV + shift_N[:, None]).abs()
        nll_s_N, nll_t_N = log_S_N - s_NV.gather(1, label_N1)[:, 0], log_T_N - t_NV.gather(1, label_N1)[:, 0]
        block["student_maxima"].copy_(maxima_s_NG)
        block["teacher_maxima"].copy_(maxima_t_NG)
        distances = [forward_N, reverse_N, 0.5 * shannon_NV.sum(-1), 0.5 * apart_NV.sum(-1)]
        return torch.stack([*distances, entropy_s_N, entropy_t_N, nll_s_N, nll_t_N, log_S_N, log_T_N])
