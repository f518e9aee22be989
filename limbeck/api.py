"""The Python API: load a recipe, run it, evaluate any two models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.recipe.load import Recipe, load_recipe_or_run

if TYPE_CHECKING:
    from limbeck.pipeline.engine import FinishedRun
    from limbeck.runtime.console import Console


def load(recipe: str | Path | Mapping[str, Any], *overrides: str) -> Recipe:
    """A recipe from a shipped name, a YAML file, a run directory or a mapping, with `section.key=value` changes."""
    return load_recipe_or_run(recipe, overrides)


def evaluate(
    student: str | Path,
    *overrides: str,
    prompts: str | Path,
    teacher: str | Path | None = None,
    update: bool = False,
    console: Console | None = None,
) -> FinishedRun:
    """Measure any student beside any teacher on any prompts, without a training run.

    Args:
        student: a model directory, hub id, GGUF file or named asset.
        teacher: the same; without one only what needs none is measured.
        overrides: `section.key=value`, such as evaluate.groups=[fidelity,diversity] or output_dir=DIR.
        prompts: a file or data set, all of which is evaluated on.

    Raises:
        LimbeckError: anything a person can mend, in one line.
    """
    from limbeck.pipeline.engine import FinishedRun, run_pipeline
    from limbeck.pipeline.standalone_evaluation import STANDALONE_STAGES, recipe_of

    recipe = recipe_of(str(student), None if teacher is None else str(teacher), str(prompts), overrides)
    return FinishedRun(run_pipeline(recipe, stages=STANDALONE_STAGES, console=console, update=update).root)


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *overrides: str,
    update: bool = False,
    console: Console | None = None,
) -> FinishedRun:
    """Run a recipe from prompts to report; what is done in its directory is not done again.

    Args:
        recipe: what `load` takes, or what it gave.
        overrides: `section.key=value` changes.
        update: redo what was made from other inputs instead of refusing.
        console: where progress goes; standard error unless given.

    Raises:
        LimbeckError: anything a person can mend, in one line.
    """
    from limbeck.pipeline.engine import FinishedRun, run_pipeline
    from limbeck.pipeline.stage_order import STAGES

    chosen = recipe if isinstance(recipe, Recipe) else load(recipe, *overrides)
    return FinishedRun(run_pipeline(chosen, stages=STAGES, console=console, update=update).root)
