"""The student of a training that has paused, measured as the evaluation would measure it.

Successive halving compares arms by it. Only the groups up to the one with the metric are asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from limbeck.evaluation.scores.files import assemble
from limbeck.pipeline.engine import Story
from limbeck.pipeline.evaluation_context import Exam, Speaker
from limbeck.pipeline.groups import GROUPS
from limbeck.pipeline.stages.train import build_initial_student
from limbeck.runtime.rundir import write_json
from limbeck.training import checkpoints
from limbeck.types import LimbeckError, ScoredRow

Means = dict[str, float]


@dataclass(kw_only=True)
class _PausedExam(Exam):
    """An exam of what the newest checkpoint holds, or of the student where training had no steps left."""

    place: Path

    @property
    def folder(self) -> Path:
        return self.place

    @property
    def _trained(self) -> bool:
        return self.story.run.done("student")

    @cached_property
    def student(self) -> Speaker:
        if self._trained:
            return super().student
        checkpoint = checkpoints.usable(self.story.run.checkpoints, self.story.console.warn)
        if checkpoint is None:
            raise LimbeckError(
                f"{self.story.run.checkpoints} holds no whole checkpoint to measure at a pause; delete it and run the "
                "same command again to train from the start"
            )
        built = build_initial_student(self.story)
        checkpoints.restore_student(checkpoint, built.model)
        return self._speaker("student", built.model.eval(), built.tokenizer)


def measure_paused(story: Story, metric: str) -> Means:
    """The means of the metrics measured on held-out prompts at a pause, `metric` among them; kept in `paused_path`.

    Raises:
        LimbeckError: no group of the recipe measures it, or there was no pause.
    """
    path, run = paused_path(story), story.run
    if run.done("student"):
        _require_no_steps_left(story)
    exam = _PausedExam(story=story, part="after", place=path.with_suffix(""))
    found: dict[str, Sequence[ScoredRow]] = {}
    means: Means = {}
    for name in story.recipe.evaluate.groups:
        measured = GROUPS[name].measure(exam)
        exam.release(student=False)
        found |= measured.named(name)
        means = {name: score.mean for name, score in assemble({}, found).after.items()}
        if metric in means:
            write_json(path, {"after": means})
            return means
    raise LimbeckError(
        f"{metric} is not measured by evaluate.groups={list(story.recipe.evaluate.groups)} (but "
        f"{', '.join(means) or 'nothing'}); name one of these, or add the group that measures it"
    )


def paused_path(story: Story) -> Path:
    """Where the numbers of a pause are kept: by what is trained, so that those of a superseded student are not read."""
    from limbeck.pipeline.stages import STAGES

    print_ = story.fingerprints(STAGES)["student"]
    return story.run.root / "halving" / f"{story.pause_at:g}-{print_[:12]}.json"


def _require_no_steps_left(story: Story) -> None:
    steps, share = (story.run.manifest("student") or {})["steps"], story.pause_at or 0.0
    if math.ceil(round(share * steps, 6)) < steps:
        raise LimbeckError(
            f"{story.run.root} was trained to its end before anybody asked how it stood after {share:g} of its steps; "
            "remove halving, or name another directory with sweep.output_dir=..."
        )
