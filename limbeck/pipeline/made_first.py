"""Models that runs of shipped recipes make, and that a recipe begins with: whether they have been made."""

from __future__ import annotations

from pathlib import Path

from limbeck.recipe.load import Recipe, load_recipe, shipped_recipes
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import LimbeckError


def require_made(recipe: Recipe) -> None:
    """See that the students of shipped recipes that a recipe begins with have been made.

    Raises:
        LimbeckError: names the recipes to run first.
    """
    named = [section.model for section in (*recipe.every_teacher.values(), recipe.student) if section.model is not None]
    absent = {Path(name).absolute(): name for name in named if not Path(name).expanduser().exists()}
    # Where nothing is absent under such a path, no recipe is read.
    last = {RunDirectory(Path()).student.name, RunDirectory(Path()).preferred.name}
    if not any(path.name in last for path in absent):
        return
    makers = {absent[made]: name for name in shipped_recipes() if (made := _student_of(name)) in absent}
    if makers:
        model, commands = next(iter(makers)), " and ".join(f"`limbeck run {name}`" for name in makers.values())
        raise LimbeckError(
            f"no model {model!r}: it is the student of the shipped recipe {makers[model]}, which has not been run "
            f"here; run {commands} first"
        )


def _student_of(name: str) -> Path:
    """The folder of the student that a shipped recipe hands on."""
    recipe = load_recipe(name)
    run = RunDirectory(recipe.directory)
    return (run.student if recipe.preference is None else run.preferred).absolute()
