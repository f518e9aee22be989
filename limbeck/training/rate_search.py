"""The search for the learning rate of a training: trials on its own first steps, before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from limbeck.models.heads import head_of
from limbeck.recipe.sections import TrainSection
from limbeck.training import learning_rate
from limbeck.training.progress import Progress
from limbeck.training.rate_trials import RateTrials, previews_wanted
from limbeck.training.run import TrainingRun
from limbeck.types import Interrupted, Response


def settings_with_rate(run: TrainingRun, progress: Progress) -> TrainSection:
    """The settings with a learning rate: the recipe's own, or the one that a search finds."""
    if run.settings.learning_rate != "auto":
        return run.settings
    if progress.learning_rate is None:
        progress.learning_rate = search_rate(run)
        run.context.console.say(f"{run.context.label}: learning rate {progress.learning_rate:.3g}, by a search")
    return replace(run.settings, learning_rate=progress.learning_rate)


def search_rate(run: TrainingRun) -> float:
    """The learning rate with which the student, as it is now, learns best."""
    student = run.module.student
    found = learning_rate.search(
        run.context.learning_rate,
        metric=run.module.loss_plan.gauge,
        guess=learning_rate.first_guess(
            head_of(student, run.module.vocab_size, verify=False).weight_VD.shape[1],
            adapters=any("lora_" in name for name, _ in student.named_parameters()),
        ),
        trials=lambda: _trials(run),
        accelerator=run.accelerator,
        say=lambda line: run.context.console.say(f"{run.context.label}: {line}"),
    )
    assert found.chosen is not None, "a search ends with a choice"
    return found.chosen


def _trials(run: TrainingRun) -> RateTrials:
    return RateTrials.of(
        run.response_source.preview(previews_wanted(run.step_rows), run.total),
        module=run.module,
        optimizer=run.optimizer.optimizer,  # type: ignore[attr-defined]
        update=lambda step, by_row, rate: _trial_update(run, step, by_row, rate),
        loss_on=run.loss_on,
    )


def _trial_update(run: TrainingRun, step: int, by_row: Mapping[int, Response], rate: float) -> bool:
    """Make one update with the gradients of some responses, without logging; False where they were not finite."""
    run.passes.seed(step)
    progress = Progress(step=step)
    means, stop = run.gradients(by_row, run.settings_at(progress), progress)
    finite = math.isfinite(means["loss"]) and math.isfinite(run.passes.clip())
    if finite:
        run.passes.update(rate)
    if stop:
        raise Interrupted("stopped while the learning rate was searched")
    return finite
