"""Checks of every arm before the first run of a sweep; errors name the arm."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.integrity import Look, intact
from limbeck.pipeline.same_inputs import require_same_inputs
from limbeck.recipe.load import Recipe, as_tree, at
from limbeck.runtime.launcher import launched
from limbeck.sweep.arms import ArmRun
from limbeck.types import LimbeckError

Prints = dict[str, str]


@dataclass
class RunChecker:
    """Checks runs and computes the fingerprints of their stages; files that runs share are read once.

    Attributes:
        update: whether a directory made from other inputs is to be brought up to date instead of being refused.
        prints: fingerprint of each stage, by the directory of the run.
    """

    update: bool
    prints: dict[Path, Prints] = field(default_factory=dict)
    _cards: dict[str, RunContext] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def inspect(self, runs: Sequence[ArmRun]) -> None:
        """Check runs whose teacher can be loaded.

        Raises:
            LimbeckError: one would fail, or its directory holds another run.
        """
        from limbeck.pipeline.stage_order import STAGES

        self.check(runs)
        for run in runs:
            with at(f"arm {run.arm}"):
                context = self._context(run.recipe)
                self.prints[run.directory] = context.fingerprints(STAGES)
                if not self.update:
                    require_same_inputs(context, STAGES, self.prints[run.directory])

    def check(self, runs: Sequence[ArmRun], *, models: bool = True) -> None:
        """Check what can be known before models are trained.

        Args:
            models: whether the models are there, or others in their place that are like them; else only objectives
                are looked at.

        Raises:
            LimbeckError: a run would fail.
        """
        from limbeck.pipeline.build import loss_plan_of
        from limbeck.pipeline.stage_order import STAGES

        for run in runs:
            # The seeds of an arm share its mistakes.
            settings = json.dumps([run.arm, run.keys, *_models(run.recipe)], sort_keys=True)
            if settings not in self._seen:
                self._seen.add(settings)
                with at(f"arm {run.arm}"):
                    loss_plan_of(run.recipe)
                    for stage in STAGES if models else ():
                        stage.check(self._context(run.recipe))

    def finished(self, run: ArmRun) -> bool:
        """Whether all stages of a run are done for exactly these inputs."""
        directory = RunContext(run.recipe).run
        prints = self.prints[run.directory]
        return all(directory.finished(stage, fingerprint_) for stage, fingerprint_ in prints.items())

    def signal_fingerprint(self, run: ArmRun) -> str:
        """Fingerprint of the teacher signal, the same for runs that share prompts, responses and signal."""
        return self.prints[run.directory]["teach"]

    def _context(self, recipe: Recipe) -> RunContext:
        """A run context that knows the models' vocabularies where an earlier one has read them."""
        context, tree = RunContext(recipe), as_tree(recipe)
        pair = json.dumps([tree["teacher"], tree["student"]], sort_keys=True)
        if pair not in self._cards:
            self._cards[pair] = context
        known = self._cards[pair]
        context.teacher_card, context.student_card = known.teacher_card, known.student_card
        return context


def _models(recipe: Recipe) -> tuple[str | None, str | None]:
    return recipe.teacher.model, recipe.student.model


def check_recipe(recipe: Recipe, *, update: bool) -> None:
    """Check a recipe that runs before the arms.

    Raises:
        LimbeckError: it would fail, or its directory holds another run.
    """
    from limbeck.pipeline.stage_order import STAGES

    context = RunContext(recipe)
    for stage in STAGES:
        stage.check(context)
    if not update:
        require_same_inputs(context, STAGES, context.fingerprints(STAGES))


def has_student(recipe: Recipe) -> bool:
    """Whether the run of a recipe has made the student that it hands on, and still has it as it was written.

    What is gone or damaged the run makes again from its other stages.
    """
    from limbeck.pipeline.stage_order import STAGES

    context, maker = RunContext(recipe), "train" if recipe.preference is None else "prefer"
    if not context.run.done(maker):
        return False
    (stage,) = (stage for stage in STAGES if stage.name == maker)
    return intact(context.run, stage, context.fingerprints(STAGES)[maker], Look("time", handed_on=False))


def refuse_launcher() -> None:
    """A sweep starts its own processes.

    Raises:
        LimbeckError: under a launcher, which would start the sweep once per rank, or that asks for what no run can do.
    """
    if "RANK" in os.environ:
        raise LimbeckError(
            "a sweep was started by a launcher of several processes; start `limbeck sweep` alone, it runs its arms "
            "side by side itself (parallel), each in one process"
        )
    launched()


def refuse_other_files(root: Path) -> None:
    """A sweep begins in an empty directory, or goes on in its own.

    Raises:
        LimbeckError: the directory holds something else.
    """
    from limbeck.sweep.settings import RESOLVED

    if root.exists() and not root.is_dir():
        raise LimbeckError(f"{root} is a file; name a directory with sweep.output_dir=...")
    known = (root / RESOLVED).exists() or (root / ".lock").exists()
    if (root.is_dir() and any(root.iterdir()) and not known) or (root / "recipe.resolved.yaml").exists():
        raise LimbeckError(
            f"{root} holds files that are no sweep of limbeck; name another directory with sweep.output_dir=..."
        )
