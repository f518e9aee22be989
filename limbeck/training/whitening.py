"""Mean and standard deviation of a rule's values over a whole step, before its gradients are computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from limbeck.ops import onednn
from limbeck.training.loss import StepSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from limbeck.types import Signal, TokenBatch

# Of a step whose advantages are all the same.
SMALLEST_VARIANCE = 1e-8


@torch.no_grad()
def whitened(
    step_settings: StepSettings,
    batches: Iterable[tuple[TokenBatch, Signal, bool]],
    *,
    accelerator: Accelerator,
    model: nn.Module,
) -> StepSettings:
    """The settings with the mean and the standard deviation over the tokens of all micro-batches and ranks.

    A pass of the student without gradients and without dropout: the update is the same whatever the micro-batches and
    the ranks of a step are.

    Args:
        batches: the micro-batches of this rank with the teacher's signals, and whether their tokens count.
        model: as accelerate prepared it.
    """
    found = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    training, looking = model.training, replace(step_settings, rule_only=True)
    model.eval()
    for batch, signal, counts in batches:
        weight_N = torch.zeros(batch.labels_N.shape, device=batch.labels_N.device)
        with onednn.linears():
            *_, plain_N = model(batch, signal, weight_N, looking)
        if counts:
            plain_N = plain_N.double()
            found += torch.stack([plain_N.new_tensor(float(len(plain_N))), plain_N.sum(), plain_N.square().sum()])
    model.train(training)
    summed: Tensor = accelerator.reduce(found, reduction="sum")  # type: ignore[assignment]
    count, total, square = summed.tolist()
    mean = total / count
    variance = max(square / count - mean**2, 0.0)
    return replace(step_settings, whitening=(mean, (variance + SMALLEST_VARIANCE) ** 0.5))
