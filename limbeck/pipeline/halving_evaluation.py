"""Evaluation of a student whose training is paused, for successive halving.

Successive halving compares arms by it. Only the groups up to the one with the metric are asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.evaluation.context import ChatModel
from limbeck.evaluation.scores.files import assemble
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.pipeline.initial_student import build_initial_student
from limbeck.runtime.files import write_json
from limbeck.training import checkpoints
from limbeck.types import LimbeckError, ScoredRow

RungMeans = dict[str, float]


@dataclass(kw_only=True)
class _PausedEvaluation(RunEvaluation):
    """Evaluation of the newest checkpoint, or of the student where training has ended."""

    place: Path

    @property
    def folder(self) -> Path:
        return self.place

    @property
    def trained(self) -> bool:
        return self.context.run.done("train")

    @property
    def built(self) -> bool:
        return not self.trained

    def _load_student(self) -> ChatModel:
        if self.trained:
            return super()._load_student()
        checkpoint = checkpoints.usable(self.context.run.checkpoints, self.context.console.warn)
        if checkpoint is None:
            raise LimbeckError(
                f"{self.context.run.checkpoints} holds no whole checkpoint to measure at a pause; delete it and run "
                "the same command again to train from the start"
            )
        built = build_initial_student(self.context)
        checkpoints.restore_student(checkpoint, built.model)
        return self._speaker("student", built.model.eval(), built.tokenizer)


def measure_paused(context: RunContext, metric: str) -> RungMeans:
    """The means of the metrics measured on held-out prompts at a pause, `metric` among them; kept in `paused_path`.

    Raises:
        LimbeckError: no group of the recipe measures it, or there was no pause.
    """
    path, run = paused_path(context), context.run
    if run.done("train"):
        _require_no_steps_left(context)
    evaluation = _PausedEvaluation(context=context, part="after", place=path.with_suffix(""))
    found: dict[str, Sequence[ScoredRow]] = {}
    means: RungMeans = {}
    for name, group in context.recipe.evaluate.groups.items():
        evaluation.write_ahead([group])
        measured = group.measure(evaluation)
        evaluation.release_teacher()
        found |= measured.named(name)
        means = {measured_as: score.mean for measured_as, score in assemble({}, found).after.items()}
        if metric in means:
            evaluation.release_student()
            write_json(path, {"after": means})
            return means
    raise LimbeckError(
        f"{metric} is not measured by evaluate.groups={list(context.recipe.evaluate.groups)} (but "
        f"{', '.join(means) or 'nothing'}); name one of these, or add the group that measures it"
    )


def paused_path(context: RunContext) -> Path:
    """File of the metrics of a pause, by fingerprint of student and evaluation: superseded ones are not read."""
    from limbeck.pipeline.stage_order import STAGES

    evaluated = context.fingerprints(STAGES)["evaluate"]
    return context.run.root / "halving" / f"{context.pause_at:g}-{evaluated[:12]}.json"


def _require_no_steps_left(context: RunContext) -> None:
    steps, share = (context.run.manifest("train") or {})["steps"], context.pause_at or 0.0
    if math.ceil(round(share * steps, 6)) < steps:
        raise LimbeckError(
            f"{context.run.root} was trained to its end before anybody asked how it stood after {share:g} of its "
            "steps; remove halving, or name another directory with sweep.output_dir=..."
        )
