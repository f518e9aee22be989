"""Checks of the student between steps: whether its numbers are finite, and its loss on held-out responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from limbeck.ops import onednn
from limbeck.rollouts.collate import collate
from limbeck.training.loss import StepSettings
from limbeck.types import Response

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """Checks of the student, on every rank for itself: all have the same weights and read the same rows.

    Attributes:
        model: as accelerate prepared it.
        clip: clips the gradient and gives its norm.
        chunks: cuts responses into those of a forward pass each.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: Callable[[], float]
    chunks: Callable[[Mapping[int, Response]], Sequence[tuple[int, ...]]]
    pad_id: int

    def fault(self, response: Response) -> str | None:
        """Fault after an update; None where the loss on a response is finite and its gradient too.

        Weights beyond all measure may still give a finite loss.
        """
        loss = self._cross_entropy({0: response})
        with self.accelerator.no_sync(self.model), onednn.linears():
            self.accelerator.backward(loss)
        value, grad_norm = loss.item(), self.clip()
        self.optimizer.zero_grad()
        if math.isfinite(value) and math.isfinite(grad_norm):
            return None
        return f"after the update loss {value}, gradient norm {grad_norm}"

    @torch.no_grad()
    def heldout_loss(self, responses: Sequence[Response]) -> float:
        """Cross-entropy per token, nats, of held-out responses."""
        by_row = dict(enumerate(sorted(responses, key=lambda r: -r.length)))
        self.model.eval()
        total = sum(self._cross_entropy({row: by_row[row] for row in rows}).item() for rows in self.chunks(by_row))
        self.model.train()
        return total / sum(r.tokens for r in by_row.values())

    def _cross_entropy(self, by_row: Mapping[int, Response]) -> Tensor:
        """Sum over the tokens of some responses of -log q."""
        batch = collate(by_row, tuple(by_row), pad_id=self.pad_id).to(self.accelerator.device)
        weight_N = torch.ones_like(batch.labels_N, dtype=torch.float32)
        with self.accelerator.no_sync(self.model), onednn.linears():
            return self.model(batch, None, weight_N, StepSettings())[0]
