"""Importance weights of tokens that were drawn from something else than the current student."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Ratio = Literal["step", "prefix", "sequence"]


@torch.no_grad()
def importance_weight(
    log_q_N: Tensor, log_drawn_N: Tensor, sequence_N: Tensor, *, ratio: Ratio, clip_weight: float = 0.0
) -> Tensor:
    """The student's probability over the one that the tokens were drawn with (N,), without gradient.

    Args:
        log_q_N: log-probabilities of the tokens under the student.
        log_drawn_N: under what they were drawn from.
        sequence_N: the row of each token, int64, row by row.
        ratio: of the token itself ("step"), of the response up to and including it ("prefix"), or of the whole response
            ("sequence").
        clip_weight: no weight is above this; 0 is off.
    """
    log_weight_N = log_q_N - log_drawn_N.to(log_q_N)
    if ratio == "prefix":
        # In double precision: the rows before are taken off again.
        running = pad(log_weight_N.double().cumsum(0), (1, 0))
        length_B = torch.bincount(sequence_N)
        first_N = (length_B.cumsum(0) - length_B)[sequence_N]
        log_weight_N = (running[1:] - running[first_N]).to(log_q_N)
    elif ratio == "sequence" and log_weight_N.numel():
        total_B = log_weight_N.new_zeros(int(sequence_N.max()) + 1).index_add(0, sequence_N, log_weight_N)
        log_weight_N = total_B[sequence_N]
    weight_N = log_weight_N.exp()
    return weight_N.clamp_max(clip_weight) if clip_weight else weight_N
