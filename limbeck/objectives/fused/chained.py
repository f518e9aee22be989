"""Groups of tokens that only together are the same text to both models, compared by the probability of that text.

By the chain rule a group has the product of its tokens' probabilities. The models are compared on two classes: this
text, and everything else that could have come instead, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from limbeck.objectives.base import Objective, Rows
from limbeck.objectives.fused.loss import fused_distillation_loss
from limbeck.objectives.sums import AnyObjective, CrossEntropy, row_leaves
from limbeck.objectives.temperature import scaled
from limbeck.types import Head, LimbeckError


def check_chain(objective: AnyObjective) -> None:
    """Check that an objective can compare two classes.

    Raises:
        LimbeckError: it is not defined on a class that stands for many tokens.
    """
    for _, part in row_leaves(objective):
        if "teacher" in part.reads and "topk_tail" not in part.supports:
            raise LimbeckError(
                f"objective {part.name!r} is not defined on a class that stands for many tokens, which teacher.across."
                "merged=chain compares with; set teacher.across.merged=leave_out, or choose another objective"
            )


def chained_loss(
    student_hidden_ND: Tensor,
    student_head: Head,
    objective: AnyObjective,
    group_N: Tensor,
    logp_G: Tensor,
    *,
    label_N: Tensor,
    weight_N: Tensor,
    token_options: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The same as these lines, without ever holding N x V numbers:

        log_q_N = (student_hidden_ND @ student_head.weight_VD.T).log_softmax(-1).gather(-1, label_N)
        log_q_G = log_q_N summed by group_N
        value_G = objective of (log_q_G, log(1 - q_G)) and (logp_G, log(1 - p_G))
        loss = (mean of weight_N in the group * value_G).sum()

    Args:
        group_N: the group that each position belongs to, int64.
        logp_G: the teacher's log-probability of each group.

    Returns:
        The loss with gradient, and the value of each position (N,): that of its group over the group's tokens.
    """
    with torch.no_grad():
        alone = fused_distillation_loss(
            student_hidden_ND, student_head, None, CrossEntropy(), label_N=label_N, compile="off"
        )
    sizes_G = torch.bincount(group_N, minlength=len(logp_G))
    log_q_G = alone.value_N.new_zeros(len(logp_G)).index_add(0, group_N, -alone.value_N)
    weight_N = weight_N.detach().to(log_q_G)
    weight_G = log_q_G.new_zeros(len(logp_G)).index_add(0, group_N, weight_N) / sizes_G
    first_G = log_q_G.new_zeros(len(logp_G), dtype=torch.int64).scatter_reduce(
        0, group_N, torch.arange(len(group_N), device=group_N.device), "amin", include_self=False
    )
    options = {name: option_N[first_G].to(log_q_G) for name, option_N in token_options.items()}
    value_G, slope_G = _on_two_classes(objective, log_q_G, logp_G.to(log_q_G), options)
    # The slope in log q of a group is that in log q of each of its tokens: cross-entropy weighted by it.
    pushed = fused_distillation_loss(
        student_hidden_ND,
        student_head,
        None,
        CrossEntropy(),
        label_N=label_N,
        weight_N=-(weight_G * slope_G)[group_N],
        compile="off",
    )
    loss = pushed.loss - pushed.loss.detach() + (weight_G * value_G).sum()
    return loss, (value_G / sizes_G)[group_N]


def _on_two_classes(
    objective: AnyObjective, log_q_G: Tensor, log_p_G: Tensor, options: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Value of each group, and its slope in the student's log-probability."""
    parts: list[tuple[float, Objective]] = [one for one in row_leaves(objective) if "teacher" in one[1].reads]
    one_G1 = torch.ones_like(log_q_G).unsqueeze(-1)
    with torch.enable_grad():
        log_q_G = log_q_G.detach().requires_grad_()
        rows = Rows(
            student_logits_NK=_two_classes(log_q_G),
            teacher_logits_NK=_two_classes(log_p_G),
            student_tau_N1=one_G1,
            teacher_tau_N1=one_G1,
            label_N=torch.zeros_like(log_q_G, dtype=torch.int64),
            token_options=options,
        )
        value_G = reduce(torch.add, (weight * scaled(part, rows)[0] for weight, part in parts))
        (slope_G,) = torch.autograd.grad(value_G.sum(), log_q_G)
    return value_G.detach(), slope_G


def _two_classes(logp_G: Tensor) -> Tensor:
    """Log-probabilities of a text and of everything else; no text is so sure that nothing is left."""
    logp_G = logp_G.clamp_max(-torch.finfo(logp_G.dtype).eps)
    return torch.stack([logp_G, (-torch.expm1(logp_G)).log()], dim=-1)
