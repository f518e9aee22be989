"""One run of a sweep as a task, done in this process or in a worker's by the same code."""

from __future__ import annotations

import gc
import signal
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.recipe.load import load_recipe
from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.console import PlainConsole
from limbeck.runtime.errors import explain
from limbeck.runtime.files import read_json
from limbeck.sweep.settings import Tree
from limbeck.types import Interrupted


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run for a worker. All of it goes through JSON.

    Attributes:
        recipe: complete.
        arm: its name; empty for a run that comes before all arms.
        artifacts: folder of what the runs share.
        pause_at: share of the steps after which training stops for now.
        metric: to measure at the pause.
    """

    recipe: Tree
    artifacts: str
    update: bool
    arm: str = ""
    pause_at: float | None = None
    metric: str | None = None

    @property
    def directory(self) -> str:
        return str(self.recipe["output_dir"])


def log_of(directory: Path) -> Path:
    """The log of a run, beside its directory, which holds nothing that a run on its own would not write."""
    return directory.with_name(f"{directory.name}.log")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a task.

    Attributes:
        error: one line where it failed.
        means: what was measured at a pause.
        number: of the signal that stopped it.
        lost: whether its process was killed or ended by itself, so that nothing is known of the run.
    """

    state: Literal["done", "paused", "failed", "stopped"]
    error: str | None = None
    means: Mapping[str, float] | None = None
    number: int = 0
    lost: bool = False


def perform(task: Task) -> Outcome:
    """Do a run, with its console in a log beside its directory. Any failure is an outcome, never an exception."""
    try:
        recipe = load_recipe(task.recipe)
        path = log_of(recipe.directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file, warnings.catch_warnings():
            console = PlainConsole(file)
            warnings.showwarning = lambda message, *_args, **_options: console.warn(" ".join(str(message).split()))
            context = RunContext(recipe, console, artifacts=ArtifactCache(Path(task.artifacts)), pause_at=task.pause_at)
            outcome = _played(context, task, file)
    except KeyboardInterrupt as interrupt:
        return Outcome(state="stopped", number=interrupt.args[0] if interrupt.args else signal.SIGINT)
    except OSError as error:
        # Not the run: its log.
        return Outcome(state="failed", error=explain(error))
    # Models may sit in cycles, and the next run needs their memory.
    gc.collect()
    return outcome


def _played(context: RunContext, task: Task, log: TextIO) -> Outcome:
    try:
        return _play(context, task)
    except Exception as error:
        line = explain(error)
        if line is None:
            traceback.print_exc(file=log)
            line = f"{type(error).__name__}: {' '.join(str(error).split())} ({log.name} says where)"
        context.console.say(f"failed: {line}")
        return Outcome(state="failed", error=line)


def _play(context: RunContext, task: Task) -> Outcome:
    from limbeck.pipeline.halving_evaluation import measure_paused, paused_path
    from limbeck.pipeline.stage_order import STAGES

    recipe, console = context.recipe, context.console
    if task.pause_at is None or task.metric is None:
        run_pipeline(recipe, stages=STAGES, console=console, update=task.update, artifacts=context.artifacts)
        return Outcome(state="done")
    if (path := paused_path(context)).exists() and task.metric in (means := read_json(path)["after"]):
        return Outcome(state="paused", means=means)
    try:
        run_pipeline(
            recipe,
            stages=STAGES,
            until="train",
            console=console,
            update=task.update,
            artifacts=context.artifacts,
            pause_at=task.pause_at,
        )
    except Interrupted as paused:
        console.say(f"halving: {paused}")
    with context.stop.installed(), context.run.locked(console.warn):
        return Outcome(state="paused", means=measure_paused(context, task.metric))
