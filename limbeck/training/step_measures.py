"""What is measured over all tokens of a step before its gradients are computed.

A pass of the student without gradients and without dropout: the update is the same whatever the micro-batches and the
ranks of a step are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from limbeck.ops import onednn
from limbeck.training.loss import Look, StepSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from limbeck.types import Signal, TokenBatch

# Of a step whose advantages are all the same.
SMALLEST_VARIANCE = 1e-8
# The micro-batches of a rank with the teacher's signals, and whether their tokens count.
ScoredBatches = Iterable[tuple["TokenBatch", "Signal", bool]]


def whitened(
    step_settings: StepSettings, seen: ScoredBatches, *, accelerator: Accelerator, model: nn.Module
) -> StepSettings:
    """The settings with the mean and the standard deviation of a rule's values.

    Args:
        model: as accelerate prepared it.
    """
    found = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for plain_N in _looked("whitened", step_settings, seen, model):
        plain_N = plain_N.double()
        found += torch.stack([plain_N.new_tensor(float(len(plain_N))), plain_N.sum(), plain_N.square().sum()])
    summed: Tensor = accelerator.reduce(found, reduction="sum")  # type: ignore[assignment]
    count, total, square = summed.tolist()
    mean = total / count
    variance = max(square / count - mean**2, 0.0)
    return replace(step_settings, whitening=(mean, (variance + SMALLEST_VARIANCE) ** 0.5))


def with_median(step_settings: StepSettings, seen: ScoredBatches, *, model: nn.Module) -> StepSettings:
    """The settings with the median difficulty of a token, for a temperature that adapts to it.

    Args:
        model: as accelerate prepared it.
    """
    temperature = step_settings.temperature
    assert temperature.adapt is not None, "asked of a temperature that adapts"
    own = [difficulty_N.cpu() for difficulty_N in _looked("difficulty", step_settings, seen, model)]
    every: list[Tensor] = gather_object(own)
    adapt = replace(temperature.adapt, median=torch.cat(every).median().item())
    return replace(step_settings, temperature=replace(temperature, adapt=adapt))


@torch.no_grad()
def _looked(look: Look, step_settings: StepSettings, seen: ScoredBatches, model: nn.Module) -> list[Tensor]:
    """The values (N,) of the micro-batches whose tokens count; every rank passes through all of its own."""
    training, looking = model.training, replace(step_settings, look=look)
    model.eval()
    found: list[Tensor] = []
    for batch, signal, counts in seen:
        weight_N = torch.zeros(batch.labels_N.shape, device=batch.labels_N.device)
        with onednn.linears():
            *_, value_N = model(batch, signal, weight_N, looking)
        if counts:
            found.append(value_N)
    model.train(training)
    return found
