"""The search for the learning rate of a training: trials on its own first steps, before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from limbeck.models.heads import head_of
from limbeck.recipe.sections import TrainSection
from limbeck.runtime.folders import remove
from limbeck.training import learning_rate, trained_weights
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
    # A copy in memory would be as large as the weights.
    start = run.context.learning_rate.with_name(f"{run.context.label}-start")
    found = learning_rate.search(
        run.context.learning_rate,
        metric=run.module.loss_plan.gauge,
        guess=learning_rate.first_guess(
            head_of(student, run.module.vocab_size, verify=False).weight_VD.shape[1],
            adapters=any("lora_" in name for name, _ in student.named_parameters()),
        ),
        trials=lambda: _trials(run, start),
        accelerator=run.accelerator,
        say=lambda line: run.context.console.say(f"{run.context.label}: {line}"),
    )
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        remove(start)
    assert found.chosen is not None, "a search ends with a choice"
    return found.chosen


def _trials(run: TrainingRun, start: Path) -> RateTrials:
    trained_weights.save(start, run.module)
    return RateTrials.of(
        run.response_source.preview(previews_wanted(run.step_rows), run.total),
        put_back=lambda: trained_weights.restore(start, run.module),
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
