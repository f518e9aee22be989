"""Fidelity of the student while it trains, on the responses that are set aside for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from limbeck.evaluation.fidelity import measure
from limbeck.evaluation.token_metrics.tokens import FidelityChunk
from limbeck.models.forward import hidden_states
from limbeck.models.heads import head_of
from limbeck.rollouts.collate import collate
from limbeck.types import DenseSignal, Response, SignalSource

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
    order = sorted(aside, key=lambda row: (-aside[row].length, row))

    def found(student: nn.Module) -> dict[str, float]:
        chunks = _chunks(student, aside, order, teacher, vocab_size=vocab_size, device=device)
        # Not compiled: a few rows would not pay for it.
        rows = measure(chunks, top_k=2, compile="off").rows
        tokens = sum(row.weight for row in rows)
        return {name: sum(row.weight * row.values[name] for row in rows) / tokens for name in _LOGGED}

    return found


def _chunks(
    student: nn.Module,
    aside: Mapping[int, Response],
    order: Sequence[int],
    teacher: SignalSource,
    *,
    vocab_size: int,
    device: torch.device,
) -> Iterator[FidelityChunk]:
    head = head_of(student, vocab_size, verify=False)
    for start in range(0, len(order), _ROWS):
        batch = collate(aside, order[start : start + _ROWS], pad_id=0)
        with torch.inference_mode():
            hidden_ND = hidden_states(student, batch.to(device))
        signal = teacher.signal(batch)
        assert isinstance(signal, DenseSignal), "asked for with the full support alone"
        yield FidelityChunk(
            student_hidden_ND=hidden_ND,
            student_head=head,
            teacher=signal,
            label_ids_N=batch.labels_N.to(hidden_ND.device),
            ids=tuple(f"{row}" for row in batch.rows),
            lengths=tuple(aside[row].tokens for row in batch.rows),
        )
