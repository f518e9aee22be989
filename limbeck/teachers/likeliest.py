"""Signals of the likeliest tokens: of a teacher that says no more, and of the mean of several teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from limbeck.types import DenseSignal, Head, LimbeckError, TopKSignal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of the probabilities of one teacher at a time.
_BLOCK_BYTES = 1 << 26


def vocabulary_alone(vocab_size: int, device: torch.device | None = None) -> Head:
    """The head of a teacher that gives no hidden states: of width 0, with the real vocabulary."""
    import torch

    return Head(weight_VD=torch.zeros(vocab_size, 0, device=device), vocab_size=vocab_size)


def at_temperature_one(ids_NK: Tensor, logp_NK: Tensor) -> TopKSignal:
    """The signal of tokens whose log-probabilities are known at temperature 1, where log Z is zero by definition."""
    log_z_NG = logp_NK.new_zeros(len(ids_NK), 1)
    return TopKSignal(ids_NK=ids_NK, logp_NK=logp_NK, temperatures=(1.0,), log_z_NG=log_z_NG)


def likeliest_of_mean(
    signals: Sequence[DenseSignal], weights: Sequence[float], k: int, temperatures: tuple[float, ...]
) -> TopKSignal:
    """The k likeliest tokens of each position of the weighted mean of probabilities, ``log sum_i w_i p_i``.

    Over the whole vocabulary, some positions at a time: log-probabilities, the mass of all other tokens and the
    normaliser of every temperature are exact.

    Args:
        weights: of the teachers; they add up to 1.

    Raises:
        LimbeckError: fewer tokens than k.
    """
    import torch

    vocab_size = signals[0].head.vocab_size
    if k > vocab_size:
        raise LimbeckError(f"teacher.support_k is {k}, but the teachers have {vocab_size} tokens; lower it")
    rows = max(1, _BLOCK_BYTES // (4 * vocab_size))
    blocks: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, max(len(signals[0].hidden_ND), 1), rows):
        with torch.no_grad():
            logp_NV = _mean(signals, weights, slice(start, start + rows))
        logp_NK, ids_NK = logp_NV.topk(k, dim=-1)
        log_z_NG = torch.stack([(logp_NV / tau).logsumexp(-1) for tau in temperatures], dim=-1)
        blocks.append((ids_NK, logp_NK, log_z_NG))
    ids_NK, logp_NK, log_z_NG = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return TopKSignal(ids_NK=ids_NK, logp_NK=logp_NK, temperatures=temperatures, log_z_NG=log_z_NG)


def _mean(signals: Sequence[DenseSignal], weights: Sequence[float], rows: slice) -> Tensor:
    import torch

    from limbeck.models.heads import project

    mean_NV = None
    for signal, weight in zip(signals, weights, strict=True):
        logits_NV = project(signal.head, signal.hidden_ND[rows])
        own_NV = (logits_NV.float() if logits_NV.itemsize < 4 else logits_NV).log_softmax(-1) + math.log(weight)
        mean_NV = own_NV if mean_NV is None else torch.logaddexp(mean_NV, own_NV)
    assert mean_NV is not None, "of one teacher at least"
    return mean_NV
