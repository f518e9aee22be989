"""The executor of a sweep's runs: gives them to workers, records their states, and reports progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.recipe.load import as_tree
from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.console import Console, format_seconds
from limbeck.sweep.arms import ArmRun
from limbeck.sweep.checks import RunChecker
from limbeck.sweep.forecast import Forecast, teacher_first
from limbeck.sweep.settings import Sweep
from limbeck.sweep.status import RunStatus, RunTable
from limbeck.sweep.tasks import Outcome, Task
from limbeck.sweep.workers import WorkerPool

_STATE: dict[str, RunStatus] = {"done": "done", "failed": "failed", "paused": "waiting", "stopped": "waiting"}


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Executes runs of a sweep.

    Attributes:
        artifacts: results that the runs share.
    """

    sweep: Sweep
    console: Console
    checker: RunChecker
    table: RunTable
    artifacts: ArtifactCache
    pool: WorkerPool

    def run(self, runs: Sequence[ArmRun], pause_at: float | None = None) -> dict[Path, Outcome]:
        """Execute runs to their end, or to a pause; finished runs are skipped.

        Returns:
            how the others ended, by directory.
        """
        if pause_at is None:
            for run in runs:
                if self.checker.finished(run):
                    self.table.set(run, "done")
        todo = teacher_first([run for run in runs if self.table.state(run) != "done"], self.checker)
        metric = self.sweep.halving.metric if self.sweep.halving and pause_at is not None else None
        tasks = [
            Task(
                recipe=as_tree(run.recipe),
                artifacts=str(self.artifacts.root),
                update=self.checker.update,
                arm=run.arm,
                pause_at=pause_at,
                metric=metric,
            )
            for run in todo
        ]
        outcomes: dict[Path, Outcome] = {}

        def ended(number: int, outcome: Outcome) -> None:
            outcomes[todo[number].directory] = outcome
            self.table.set(todo[number], _STATE[outcome.state], outcome.error, lost=outcome.lost)
            self._report(todo[number], outcome)

        try:
            self.pool.run(tasks, lambda number: self.table.set(todo[number], "running"), ended)
        finally:
            for run in todo:
                if self.table.state(run) == "running":
                    self.table.set(run, "waiting")
        return outcomes

    def fail(self, runs: Sequence[ArmRun], reason: str) -> None:
        for run in runs:
            self.table.set(run, "failed", reason)

    def drop(self, runs: Sequence[ArmRun], reason: str) -> None:
        """Mark runs as dropped; they are not continued."""
        for run in runs:
            if self.table.state(run) != "failed":
                self.table.set(run, "dropped", reason)

    def _report(self, run: ArmRun, outcome: Outcome) -> None:
        lines = self.table.lines.values()
        over = sum(line.state in ("done", "failed", "dropped") for line in lines)
        left = Forecast(self.table, self.checker, self.sweep.parallel).seconds_left()
        about = f", about {format_seconds(left)} left" if left else ""
        how = f"{outcome.state}: {outcome.error}" if outcome.error else outcome.state
        self.console.say(f"{run.label}: {how} ({over} of {len(lines)} runs{about})")
