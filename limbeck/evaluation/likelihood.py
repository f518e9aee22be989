"""How likely a model finds answers: the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

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
    order = sorted(range(len(responses)), key=lambda i: (-responses[i].length, i))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate(responses, rows, pad_id=0).to(device)
        with torch.inference_mode():
            signal = teacher.signal(batch)
            assert isinstance(signal, DenseSignal), "all that a teacher can provide: see limbeck.pipeline.provisions"
            logp_N = torch.empty(len(batch.labels_N), dtype=torch.float64)
            for tokens, logits_NV in model_logit_tiles(signal.hidden_ND, signal.head):
                label_N = batch.labels_N[tokens]
                logp_N[tokens] = logits_NV.double().log_softmax(-1).gather(1, label_N[:, None])[:, 0].cpu()
        parts = logp_N.split([responses[i].tokens for i in batch.rows])
        yield from zip(batch.rows, parts, strict=True)
