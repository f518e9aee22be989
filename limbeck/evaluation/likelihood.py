"""How likely a model finds answers: the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from limbeck.evaluation.pieces import longest_first
from limbeck.objectives import model_logit_tiles
from limbeck.rollouts.collate import collate
from limbeck.types import DenseSignal, Response, SignalSource


def mean_logp(
    teacher: SignalSource, responses: Sequence[Response], *, batch_size: int, device: torch.device
) -> Iterator[tuple[int, float]]:
    """Place and mean log-probability per token of each response, in nats at temperature 1, the longest first."""
    for place, logp_T in token_logp(teacher, responses, batch_size=batch_size, device=device):
        yield place, float(logp_T.mean())


def token_logp(
    teacher: SignalSource, responses: Sequence[Response], *, batch_size: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Place and log-probabilities of the tokens of each response, in nats at temperature 1, the longest first."""
    for rows in longest_first(responses, batch_size):
        yield from zip(rows, token_logp_of(teacher, responses, rows, device=device), strict=True)


def token_logp_of(
    teacher: SignalSource, responses: Sequence[Response], rows: Sequence[int], *, device: torch.device
) -> list[Tensor]:
    """The same of some responses, in one pass of the teacher."""
    batch = collate(responses, rows, pad_id=0).to(device)
    with torch.inference_mode():
        signal = teacher.signal(batch)
        assert isinstance(signal, DenseSignal), "all that a teacher can provide: see limbeck.pipeline.provisions"
        logp_N = torch.empty(len(batch.labels_N), dtype=torch.float64)
        for tokens, logits_NV in model_logit_tiles(signal.hidden_ND, signal.head):
            label_N = batch.labels_N[tokens]
            logp_N[tokens] = logits_NV.double().log_softmax(-1).gather(1, label_N[:, None])[:, 0].cpu()
    return list(logp_N.split([responses[row].tokens for row in rows]))
