"""Measures of the tokens of a batch before the loss: distance of the models, weight of the teacher's tail."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.objectives.adaptive import tail_of
from limbeck.objectives.fused.body import block_rows
from limbeck.objectives.fused.tiles import logit_tiles, model_logit_tiles
from limbeck.types import DenseSignal, Head


@torch.no_grad()
def token_difficulty(
    student_hidden_ND: Tensor, student_head: Head, signal: DenseSignal, tile_bytes: int | None = None
) -> Tensor:
    """Hellinger distance of student and teacher at temperature 1, one per token (N,), in [0, 1]. No gradient.

    The difficulty of AdaKD (arXiv 2510.11615).
    """
    values = [student_hidden_ND.new_zeros(0, dtype=torch.float32)]
    for _, student_NV, teacher_NV in logit_tiles(student_hidden_ND, student_head, signal, tile_bytes):
        size = block_rows(student_NV.shape[1], student_NV.dtype, student_NV.device)
        for student, teacher in zip(student_NV.split(size), teacher_NV.split(size), strict=True):
            roots = [(t.log_softmax(-1) / 2).exp() for t in (student, teacher)]
            values.append(((roots[0] - roots[1]) ** 2).sum(-1).div(2).sqrt())
    return torch.cat([v.to(values[-1].dtype) for v in values])


@torch.no_grad()
def tail_weights(signal: DenseSignal, sequence_N: Tensor, k: int = 10, beta: float = 2.0) -> Tensor:
    """beta over the mean tail mass of the token's sequence: the `tail_weight` of TAD (arXiv 2602.20816), one per token.

    Args:
        sequence_N: which sequence each token belongs to, int64 from 0.
    """
    masses = [signal.hidden_ND.new_zeros(0, dtype=torch.float32)]
    for _, teacher_NV in model_logit_tiles(signal.hidden_ND, signal.head):
        for teacher in teacher_NV.split(block_rows(teacher_NV.shape[1], teacher_NV.dtype, teacher_NV.device)):
            log_p_NV = teacher.log_softmax(-1)
            masses.append(torch.where(tail_of(log_p_NV, k), log_p_NV.exp(), 0.0).sum(-1))
    mass_N = torch.cat([m.to(masses[-1].dtype) for m in masses])
    count_S = torch.bincount(sequence_N)
    mean_S = mass_N.new_zeros(count_S.shape).index_add(0, sequence_N, mass_N) / count_S.clamp_min(1)
    return beta / mean_S.clamp_min(torch.finfo(mass_N.dtype).tiny)[sequence_N]
