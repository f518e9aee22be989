"""Fidelity of the student during training, on set-aside responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from limbeck.evaluation.fidelity import chunks_of, measure
from limbeck.models.heads import head_of
from limbeck.types import Response, SignalSource

# Rows of one forward pass.
_ROWS = 16
# Of the group fidelity what shows whether a training goes the right way.
_LOGGED = ("forward_kl", "reverse_kl", "top1_agreement")


def fidelity_on(
    aside: Mapping[int, Response], teacher: SignalSource, *, vocab_size: int, device: torch.device
) -> Callable[[nn.Module], dict[str, float]]:
    """A measurement of forward KL, reverse KL (nats per token, temperature 1) and top-1 agreement.

    Args:
        aside: the set-aside responses by the teacher's number.
        vocab_size: real token ids of the pair.
    """

    def found(student: nn.Module) -> dict[str, float]:
        head = head_of(student, vocab_size, verify=False)
        chunks = chunks_of(student, head, aside, teacher, batch_size=_ROWS, device=device)
        # Not compiled: a few rows would not pay for it.
        rows = measure(chunks, top_k=2, compile="off").rows
        tokens = sum(row.weight for row in rows)
        return {name: sum(row.weight * row.values[name] for row in rows) / tokens for name in _LOGGED}

    return found
