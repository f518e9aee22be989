"""Distance between what two models give to the tokens that only one of them has, by rank (ULD, arXiv 2402.12030).

Such tokens cannot be compared one by one. Universal Logit Distillation compares the two lists of their probabilities,
each sorted, the shorter one filled up with zeros. The tokens that both models have are left to the objective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.objectives.fused.projection import Projection, gather_head, prepare_projection
from limbeck.types import Head, SharedSignal

# Logits of so many bytes exist at a time.
BLOCK_BYTES = 64 << 20


def sorted_rest_loss(
    student_hidden_ND: Tensor, student_head: Head, signal: SharedSignal, *, weight_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as these lines, without ever holding N x V numbers:

        q_NX = softmax(student_logits_NV)[:, ids that are not in signal.student_ids_S].sort(descending=True)
        p_NY = softmax(teacher_logits_NW)[:, len(signal.student_ids_S):].sort(descending=True)
        value_N = (q_NX - p_NY).abs().sum(-1), the shorter one filled up with zeros
        loss = (weight_N * value_N).sum()

    Args:
        signal: the teacher's, of positions that are all aligned.

    Returns:
        The loss with gradient, and the value of each position (N,), between 0 and 2.
    """
    head, theirs = gather_head(student_head), gather_head(signal.head)
    value_N: Tensor
    loss, value_N = _SortedRest.apply(
        student_hidden_ND,
        head.weight_VD,
        head.bias_V,
        head,
        signal.hidden_ND,
        theirs,
        _complement(signal.student_ids_S, head.vocab_size),
        weight_N.detach(),
    )  # pyright: ignore[reportGeneralTypeIssues]
    return loss, value_N


def _complement(ids_S: Tensor, size: int) -> Tensor:
    """The ids below `size` that are not in a list, ascending."""
    lacks = torch.ones(size, dtype=torch.bool, device=ids_S.device)
    lacks[ids_S] = False
    return lacks.nonzero().flatten()


class _SortedRest(torch.autograd.Function):
    """Loss and values; the gradients are made beside them, a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        teacher_ND: Tensor,
        teacher_head: Head,
        own_X: Tensor,
        weight_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        student = prepare_projection(hidden_ND, head, "student")
        teacher = prepare_projection(teacher_ND.to(teacher_head.weight_VD.dtype), teacher_head, "teacher")
        shared = head.vocab_size - len(own_X)
        grad_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_V = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        values = [hidden_ND.new_zeros(0, dtype=student.dtype)]
        rows = max(1, BLOCK_BYTES // (max(student.vocab_size, teacher.vocab_size) * student.dtype.itemsize))
        for start in range(0, len(hidden_ND), rows):
            block = slice(start, start + rows)
            logits_BV = _logits(student, hidden_ND[block])
            q_BV = logits_BV.softmax(-1)
            theirs_BY = _logits(teacher, teacher_ND[block]).softmax(-1)[:, shared:].sort(descending=True).values
            mine_BX, order_BX = q_BV[:, own_X].sort(descending=True)
            gap_BX, beyond_B = _by_rank(mine_BX, theirs_BY.to(mine_BX.dtype))
            values.append(gap_BX.abs().sum(-1) + beyond_B)
            if grad_ND is None and grad_VD is None and grad_V is None:
                continue
            # In logits: q * (g - sum of g * q), where g is the slope in the probabilities.
            slope_BV = torch.zeros_like(q_BV)
            slope_BV[:, own_X] = torch.zeros_like(mine_BX).scatter_(1, order_BX, gap_BX.sign())
            down_BV = q_BV * (slope_BV - (slope_BV * q_BV).sum(-1, keepdim=True))
            down_BV *= weight_N[block].to(down_BV).unsqueeze(-1)
            down_BV = (down_BV * student.finish.slope(logits_BV)).to(student.weight_VD.dtype)
            if grad_ND is not None:
                grad_ND[block] = (down_BV @ student.weight_VD).to(grad_ND.dtype)
            if grad_VD is not None:
                grad_VD[: head.vocab_size] += down_BV.T @ hidden_ND[block].to(down_BV.dtype)
            if grad_V is not None:
                grad_V[: head.vocab_size] += down_BV.sum(0)
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        value_N = torch.cat(values)
        ctx.mark_non_differentiable(value_N)
        return (weight_N.to(value_N) * value_N).sum(), value_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = tuple(None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return (*found, None, None, None, None, None)


def _logits(projection: Projection, hidden_BD: Tensor) -> Tensor:
    product_BV = hidden_BD.new_empty(len(hidden_BD), projection.vocab_size, dtype=projection.dtype)
    projection.into(hidden_BD, product_BV)
    return projection.finish.logits(product_BV)


def _by_rank(mine_BX: Tensor, theirs_BY: Tensor) -> tuple[Tensor, Tensor]:
    """The difference at each rank of the first list, and the sum of the second one beyond its end."""
    both = min(mine_BX.shape[1], theirs_BY.shape[1])
    gap_BX = mine_BX.clone()
    gap_BX[:, :both] -= theirs_BY[:, :both]
    return gap_BX, theirs_BY[:, both:].sum(-1)
