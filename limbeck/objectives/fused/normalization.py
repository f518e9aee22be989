"""Normalisation of logits over the vocabulary, and the way back of a gradient through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["none", "mean", "min", "max", "std", "range"]
# Keeps a constant row finite: its standard deviation or range is zero.
STD_EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class Normalized:
    """Rows after normalisation over their possible entries; impossible ones hold zero.

    Attributes:
        logits_NK: the result.
        size_N1: what it was divided by; None where it was only shifted.
    """

    how: Normalization
    logits_NK: Tensor
    possible_NK: Tensor
    count_N1: Tensor
    size_N1: Tensor | None = None
    low_NK: Tensor | None = None
    high_NK: Tensor | None = None

    def back(self, grad_NK: Tensor) -> Tensor:
        """Gradient in the logits that came in, from that in those that went out."""
        grad_NK = torch.where(self.possible_NK, grad_NK, 0.0)
        if self.size_N1 is not None:
            grad_NK = grad_NK / self.size_N1
        total_N1 = grad_NK.sum(-1, keepdim=True)
        if self.how == "none":
            return grad_NK
        if self.how == "mean":
            return self._only(grad_NK - total_N1 / self.count_N1)
        if self.how == "std":
            assert self.size_N1 is not None
            # A deviation held at its least does not move.
            moves_N1 = torch.where(self.size_N1 > STD_EPSILON, 1 / self.count_N1, 0.0)
            through_NK = self.logits_NK * (grad_NK * self.logits_NK).sum(-1, keepdim=True) * moves_N1
            return self._only(grad_NK - total_N1 / self.count_N1 - through_NK)
        if self.how == "max":
            assert self.high_NK is not None
            return grad_NK - total_N1 * self.high_NK
        assert self.low_NK is not None
        if self.how == "min":
            return grad_NK - total_N1 * self.low_NK
        assert self.high_NK is not None
        # 2 (x - low) / (high - low) - 1: both ends move every entry.
        up_N1 = (grad_NK * (self.logits_NK + 1)).sum(-1, keepdim=True) / 2
        return grad_NK - up_N1 * self.high_NK - (total_N1 - up_N1) * self.low_NK

    def _only(self, grad_NK: Tensor) -> Tensor:
        return torch.where(self.possible_NK, grad_NK, 0.0)


def normalize(logits_NK: Tensor, possible_NK: Tensor, how: Normalization) -> Normalized:
    """Shift and size the rows: by mean, minimum, maximum; z-score (population deviation); or onto [-1, 1]."""
    filled_NK = torch.where(possible_NK, logits_NK, 0.0)
    count_N1 = possible_NK.to(logits_NK.dtype).sum(-1, keepdim=True).clamp_min(1.0)
    plain = Normalized(how=how, logits_NK=filled_NK, possible_NK=possible_NK, count_N1=count_N1)
    if how == "none":
        return plain
    if how in ("mean", "std"):
        centred_NK = torch.where(possible_NK, filled_NK - filled_NK.sum(-1, keepdim=True) / count_N1, 0.0)
        if how == "mean":
            return replace(plain, logits_NK=centred_NK)
        variance_N1 = (centred_NK * centred_NK).sum(-1, keepdim=True) / count_N1
        size_N1 = variance_N1.clamp_min(STD_EPSILON**2).sqrt()
        return replace(plain, logits_NK=centred_NK / size_N1, size_N1=size_N1)
    low_N1 = torch.where(possible_NK, logits_NK, torch.inf).amin(-1, keepdim=True)
    high_N1 = torch.where(possible_NK, logits_NK, -torch.inf).amax(-1, keepdim=True)
    low_NK, high_NK = _ends(filled_NK, possible_NK, low_N1), _ends(filled_NK, possible_NK, high_N1)
    if how == "min":
        return replace(plain, logits_NK=torch.where(possible_NK, filled_NK - low_N1, 0.0), low_NK=low_NK)
    if how == "max":
        return replace(plain, logits_NK=torch.where(possible_NK, filled_NK - high_N1, 0.0), high_NK=high_NK)
    half_N1 = ((high_N1 - low_N1) / 2).clamp_min(STD_EPSILON)
    onto_NK = torch.where(possible_NK, (filled_NK - low_N1) / half_N1 - 1, 0.0)
    return replace(plain, logits_NK=onto_NK, size_N1=half_N1, low_NK=low_NK, high_NK=high_NK)


def _ends(logits_NK: Tensor, possible_NK: Tensor, end_N1: Tensor) -> Tensor:
    """Which entries hold the end, sharing one: ties move together."""
    at_NK = (possible_NK & (logits_NK == end_N1)).to(logits_NK.dtype)
    return (at_NK / at_NK.sum(-1, keepdim=True).clamp_min(1.0)).detach()
