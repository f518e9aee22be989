"""Refusals of a run directory that holds something else: other files, an earlier version's run, or other inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.elastic import made_with_other_ranks, ranks_refusal
from limbeck.recipe import load, yaml_text
from limbeck.recipe.keys import neutral_keys
from limbeck.runtime.records import flatten
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import LimbeckError

# What stages were called before they had the names of their commands.
_EARLIER_STAGES = ("responses", "signal", "student", "evaluation")


def check_directory(run: RunDirectory) -> None:
    root = run.root
    if root.exists() and not root.is_dir():
        raise LimbeckError(f"{root} is a file; name a directory with output_dir=...")
    known = run.recipe.exists() or (root / ".lock").exists()
    if root.is_dir() and not known and any(root.iterdir()):
        raise LimbeckError(f"{root} holds files that are no run of limbeck; name another directory with output_dir=...")
    earlier = [name for name in _EARLIER_STAGES if run.manifest_path(name).exists()]
    if earlier:
        raise LimbeckError(
            f"{root} was written by an earlier version of limbeck (stages/{earlier[0]}.json); "
            "name another directory with output_dir=..., or delete it"
        )


def require_same_inputs(context: RunContext, stages: Sequence[Stage], prints: dict[str, str]) -> None:
    """Check that the run directory is empty or holds a run of the same inputs.

    Raises:
        LimbeckError: it was made from other inputs.
    """
    stale = next((stage for stage in stages if is_stale(context.run, stage, prints)), None)
    if stale is None:
        return
    record = context.run.manifest(stale.name) or {}
    ranks = None if record["done"] else made_with_other_ranks(context, stages, stale)
    if ranks is None:
        raise LimbeckError(_refusal(context, stale))
    if context.run.checkpoints.exists():
        raise LimbeckError(ranks_refusal(context, ranks))


def is_stale(run: RunDirectory, stage: Stage, prints: dict[str, str]) -> bool:
    """Whether a stage was made from other inputs, or is none of the recipe."""
    record = run.manifest(stage.name)
    return record is not None and record["fingerprint"] != prints.get(stage.name)


def _refusal(context: RunContext, stage: Stage) -> str:
    run = context.run
    remedy = (
        "name another directory with output_dir=..., or add --update to redo what depends on it "
        "(the old results move to superseded/)"
    )
    if run.recipe.exists():
        # The keys as they were written, not as this version of limbeck would read them.
        earlier = _read_recipe(run.recipe)
        if earlier is None:
            return f"{run.root} was made by a recipe that cannot be read, {run.recipe}; {remedy}"
        now = flatten(load.as_tree(context.recipe))
        keys = [k for k in {**earlier, **now} if earlier.get(k) != now.get(k) and k not in neutral_keys()]
        if keys:
            listed = "; ".join(f"{k} is {earlier.get(k)!r} there and {now.get(k)!r} here" for k in keys[:3])
            more = f" and {len(keys) - 3} more keys differ" if len(keys) > 3 else ""
            return f"{run.root} was made by another recipe: {listed}{more}; {remedy}"
    return (
        f"{run.root}: the inputs of its stage {stage.name} have changed since (a data file, or a model with its "
        f"tokenizer and chat template); {remedy}"
    )


def _read_recipe(path: Path) -> dict[str, Any] | None:
    """The keys of a resolved recipe; None where the file holds none."""
    try:
        tree = yaml_text.parse(path.read_text("utf-8"), str(path))
    except (LimbeckError, UnicodeDecodeError):
        return None
    return flatten(tree) if isinstance(tree, dict) else None
