"""Distances to a teacher that says no more than its likeliest tokens: what is certain of them, and named as a bound.

Of a position are known k tokens, their log-probabilities and the mass of all others; of the student everything. With
all other tokens as one class no divergence is larger than over the whole vocabulary (they process data), and of the
total variation there is a bound from above too: outside of the k tokens |p - q| is p + q at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.evaluation.token_metrics.likeliest import group_maxima, likeliest
from limbeck.evaluation.token_metrics.values import Chunk, TokenValues
from limbeck.objectives.fused.tiles import model_logit_tiles
from limbeck.types import LimbeckError, TopKSignal

LIKELIEST: tuple[str, ...] = (
    "forward_kl_at_least",
    "reverse_kl_at_least",
    "jensen_shannon_at_least",
    "acceptance_at_least",
    "acceptance_at_most",
    "top1_agreement",
    "topk_agreement",
    "teacher_entropy_at_least",
    "student_nll",
    "teacher_nll_at_least",
)
# The mass of all other tokens is 1 less a sum of float32 numbers: where it stands below a fraction bar, at least this.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LikeliestChunk(Chunk):
    """The student's hidden states at some positions, and the teacher's likeliest tokens there."""

    teacher: TopKSignal


@torch.no_grad()
def values_beside_likeliest(chunk: LikeliestChunk, *, top_k: int) -> TokenValues:
    """The metrics of `LIKELIEST` of every token of a chunk.

    Raises:
        LimbeckError: the teacher says too few tokens for the top-k agreement.
    """
    head, teacher, label_N = chunk.student_head, chunk.teacher, chunk.label_ids_N
    K, V = teacher.ids_NK.shape[1], head.vocab_size
    # In the last place may be the token that followed.
    if top_k > (K if K >= V else K - 1):
        raise LimbeckError(
            f"evaluate.groups.fidelity.top_k is {top_k} and the teacher says {K} tokens of a position, of which "
            f"the last may be the one that followed; set evaluate.groups.fidelity.top_k={max(K - 1, 1)}, or raise "
            "teacher.support_k"
        )
    parts, sure, ids = [], [], []
    for tokens, logits_NV in model_logit_tiles(chunk.student_hidden_ND, head):
        log_q_NV = logits_NV.double().log_softmax(-1)
        first_NK = likeliest(logits_NV, group_maxima(logits_NV), top_k)
        parts.append(_distances(log_q_NV, teacher.rows(tokens), label_N[tokens]))
        sure.append(log_q_NV.amax(-1).exp())
        ids.append(first_NK)
    d_N = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
    order_NK = teacher.logp_NK.argsort(dim=1, descending=True, stable=True)
    teacher_NK = teacher.ids_NK.gather(1, order_NK)[:, :top_k]
    student_NK = torch.cat([teacher_NK[:0], *ids])
    first_N, best_N = student_NK[:, 0], teacher_NK[:, 0]
    values = d_N | {
        "top1_agreement": (first_N == best_N).double(),
        "topk_agreement": (teacher_NK[:, :, None] == student_NK[:, None, :]).any(2).double().mean(1),
    }
    empty_N = teacher.logp_NK.new_zeros(0).double()
    return TokenValues(
        values_MN=torch.stack([values.get(name, empty_N) for name in LIKELIEST]),
        confidences=(
            (torch.cat([empty_N, *sure]), (first_N == label_N).double()),
            (teacher.logp_NK.double().amax(1).exp(), (best_N == label_N).double()),
        ),
        names=LIKELIEST,
        calibrations=("student_ece", "teacher_ece"),
    )


def _distances(log_q_NV: Tensor, teacher: TopKSignal, label_N: Tensor) -> dict[str, Tensor]:
    """The distances over the teacher's tokens and one class for all others."""
    ids_NK, log_p_NK = teacher.ids_NK, teacher.logp_NK.double()
    log_q_NK = log_q_NV.gather(1, ids_NK)
    every = ids_NK.shape[1] >= log_q_NV.shape[1]
    rest_q_N1 = log_q_NV.scatter(1, ids_NK, -math.inf).logsumexp(1, keepdim=True).exp()
    rest_p_N1 = (1 - log_p_NK.exp().sum(1, keepdim=True)).clamp_min(0) * (not every)
    p_NC, q_NC = torch.cat([log_p_NK.exp(), rest_p_N1], 1), torch.cat([log_q_NK.exp(), rest_q_N1], 1)
    mean_NC = (p_NC + q_NC) / 2
    floor_N1 = rest_p_N1 if every else rest_p_N1.clamp_min(_ROUNDING)
    # Below the bar of the reverse KL more mass makes it smaller: still a bound.
    below_NC = torch.cat([log_p_NK.exp(), floor_N1], 1)
    apart_N = (p_NC - q_NC)[:, :-1].abs().sum(1)
    low_N = (apart_N + (rest_p_N1 - rest_q_N1).abs()[:, 0]) / 2
    high_N = (apart_N + (rest_p_N1 + rest_q_N1)[:, 0]) / 2
    followed_NK = ids_NK == label_N[:, None]
    known_N = (log_p_NK.exp() * followed_NK).sum(1)
    # One that is not said is no likelier than the least likely that is, nor than all others together.
    most_N = torch.where(followed_NK.any(1), known_N, torch.minimum(floor_N1[:, 0], log_p_NK.exp().amin(1)))
    return {
        "forward_kl_at_least": _relative_entropy(p_NC, q_NC),
        "reverse_kl_at_least": _relative_entropy(q_NC, below_NC),
        "jensen_shannon_at_least": (_relative_entropy(p_NC, mean_NC) + _relative_entropy(q_NC, mean_NC)) / 2,
        "acceptance_at_least": (1 - high_N).clamp_min(0),
        "acceptance_at_most": 1 - low_N,
        "teacher_entropy_at_least": -torch.xlogy(p_NC, p_NC).sum(1),
        "student_nll": -log_q_NV.gather(1, label_N[:, None])[:, 0],
        "teacher_nll_at_least": -most_N.log(),
    }


def _relative_entropy(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    """KL(p ‖ q) of each row; classes without mass in p add nothing."""
    return torch.where(p_NC > 0, torch.xlogy(p_NC, p_NC) - torch.xlogy(p_NC, q_NC), 0.0).sum(1)
