"""Learning rate and options of the objective as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from limbeck.recipe.sections import TrainSection
from limbeck.types import LimbeckError


def total_steps(settings: TrainSection, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return settings.max_steps or _ceil(settings.num_train_epochs * steps_per_epoch)


def learning_rate(settings: TrainSection, total: int) -> Callable[[int], float]:
    """The learning rate of optimizer step i (from 0), in transformers' schedules of the same names.

    The value is computed from i alone, so resuming needs no scheduler state. A learning rate of "auto" counts as 1:
    the function then gives each step's share of a rate that is still to be found.

    Raises:
        LimbeckError: a schedule that cannot start from this learning rate.
    """
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    peak = 1.0 if settings.learning_rate == "auto" else settings.learning_rate
    warmup = settings.warmup_steps or _ceil(settings.warmup_ratio * total)
    # During warm-up transformers' first factor is 0, which wastes a step: look a step ahead, in a run a step longer.
    ahead = 1 if warmup else 0
    # transformers ties its schedules to an optimizer; only the lambda is wanted.
    carrier = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    specific = {"min_lr_rate": 0.1} if settings.lr_scheduler_type == "cosine_with_min_lr" else None
    try:
        scheduler = get_scheduler(
            settings.lr_scheduler_type,
            carrier,
            num_warmup_steps=warmup,
            num_training_steps=total + ahead,
            scheduler_specific_kwargs=specific,
        )
    except ValueError as error:
        raise LimbeckError(
            f"train.learning_rate={peak} does not go with {settings.lr_scheduler_type}: {error}; "
            "choose a larger rate or another train.lr_scheduler_type"
        ) from error
    assert isinstance(scheduler, LambdaLR)
    factor = scheduler.lr_lambdas[0]
    return lambda step: peak * factor(step + ahead)


def moved(schedule: Mapping[str, tuple[float, float]], progress: float) -> dict[str, float]:
    """The options at this share of the training, each on the line between its two ends."""
    return {name: start + (end - start) * progress for name, (start, end) in schedule.items()}


def _ceil(steps: float) -> int:
    """Rounded up, but 1.1 epochs of 10 steps, 11.000000000000002 in binary, are 11."""
    return math.ceil(round(steps, 6))
