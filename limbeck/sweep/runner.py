"""Execution of a sweep: its teacher, tuning runs, halving rounds, the runs that are left, and the comparison.

runs/sweeps/NAME/  sweep.resolved.yaml  arms.jsonl  teacher/  arms/ARM/seed=S/  arms/ARM/tune/KEY=VALUE/  shared/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.recipe.load import Recipe, as_tree, at, load_recipe
from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.console import Console, default_console
from limbeck.runtime.errors import in_one_line
from limbeck.runtime.files import write_text
from limbeck.runtime.interrupts import GracefulStop
from limbeck.runtime.rundir import RunDirectory
from limbeck.sweep.arms import Models, arms_of, final_runs, first_recipes, first_values, tuning_runs
from limbeck.sweep.checks import RunChecker, check_recipe, has_student, refuse_launcher, refuse_other_files
from limbeck.sweep.executor import Executor
from limbeck.sweep.selection import halve, tune
from limbeck.sweep.sending import command_pool, discard_sent, require_program
from limbeck.sweep.settings import RESOLVED, Sweep, load_sweep, settings_to_yaml
from limbeck.sweep.status import RunTable
from limbeck.sweep.tasks import Outcome, Task
from limbeck.sweep.worker_process import ALIVE
from limbeck.sweep.workers import WorkerPool, worker_pool
from limbeck.types import LimbeckError


@dataclass(frozen=True, kw_only=True)
class SweepEnd:
    """Result of a sweep.

    Attributes:
        runs: that were to be compared, without those that only tuned; the failed among them.
        lost: of all runs those whose process was killed twice, or whose command failed: the sweep is not what it would
            have been.
        sent: whether commands started them.
    """

    directory: Path
    runs: int
    failed: int
    lost: int = 0
    sent: bool = False

    @property
    def exit_code(self) -> int:
        if self.lost:
            return 2 if self.sent else 1
        return int(self.failed == self.runs)

    @property
    def page(self) -> Path:
        return self.directory / "compare.html"


def run_sweep(
    source: str | Path | Mapping[str, Any],
    *overrides: str,
    update: bool = False,
    console: Console | None = None,
) -> SweepEnd:
    """Run a sweep; what is done in its directory is not done again.

    Args:
        source: what `load_sweep` takes, with its overrides.
        update: redo what was made from other inputs instead of refusing; the old moves aside.
        console: where progress goes; standard error unless given.

    Raises:
        LimbeckError: an error that the caller can correct, in one line, before the first run. A run that fails later is
            shown in arms.jsonl, and the others go on.
        KeyboardInterrupt: stopped by a signal; everything finished is on disk.
    """
    refuse_launcher()
    sweep = load_sweep(source, overrides)
    console = console or default_console()
    with in_one_line(), GracefulStop().installed():
        root = sweep.directory
        refuse_other_files(root)
        runner = SweepRunner(sweep, console, RunChecker(update), ArtifactCache(root / "shared"))
        runner.check()
        if sweep.command is not None:
            require_program(sweep.command)
        with RunDirectory(root).locked(console.warn):
            # Workers of a sweep that was killed end a moment after it; what commands have started goes on to its end.
            with runner.artifacts.lock(ALIVE):
                discard_sent(root)
                write_text(root / RESOLVED, settings_to_yaml(sweep))
            return runner.run()


@dataclass(frozen=True)
class SweepRunner:
    sweep: Sweep
    console: Console
    checker: RunChecker
    artifacts: ArtifactCache

    @property
    def models(self) -> Models:
        """Models for the arms that the first runs make."""
        recipes = first_recipes(self.sweep)
        # The folders of the students that these runs will hand on.
        runs = {key: (RunDirectory(recipe.directory), recipe) for key, recipe in recipes.items()}
        return {
            key: str(run.student if recipe.preference is None else run.preferred) for key, (run, recipe) in runs.items()
        }

    def check(self) -> None:
        """Check all arms before the first run."""
        recipes = first_recipes(self.sweep)
        for key, recipe in recipes.items():
            with at(f"first.{key}"):
                check_recipe(recipe, update=self.checker.update)
        if all(has_student(recipe) for recipe in recipes.values()):
            self._inspect(self.models)
            return
        # What will be trained has the tokens and the anatomy of what it begins as, unless that is cut or made anew.
        begins = {key: r.student.model for key, r in recipes.items() if r.student.init == "pretrained"}
        whole = len(begins) == len(recipes)
        for arm in arms_of(self.sweep):
            models = {**self.models, **{key: model for key, model in begins.items() if model is not None}}
            runs = tuning_runs(self.sweep, arm, models)
            self.checker.check(runs + final_runs(self.sweep, arm, first_values(self.sweep), models), models=whole)

    def _inspect(self, models: Models) -> None:
        for arm in arms_of(self.sweep):
            self.checker.inspect(tuning_runs(self.sweep, arm, models))
            if not self.sweep.tune:
                self.checker.inspect(final_runs(self.sweep, arm, {}, models))

    def _run_first(self, pool: WorkerPool) -> None:
        """Do the runs whose students all arms need; a finished one with the same inputs is reused."""
        from limbeck.pipeline.stage_order import STAGES

        recipes = first_recipes(self.sweep)
        for key, recipe in recipes.items():
            self.console.say(f"first: {recipe.name}, whose student is {key} of all arms")
            own = load_recipe(self.sweep.first[key]).directory
            near = [own, *sorted(self.sweep.directory.parent.glob(f"*/{recipe.directory.name}"))]
            for stage, fingerprint_ in RunContext(recipe).fingerprints(STAGES).items():
                for run in (RunDirectory(directory) for directory in near):
                    if run.finished(stage, fingerprint_):
                        self.artifacts.publish(stage, fingerprint_, run)
            # The changes of a sweep are the arms', so what one says is to be changed says whose key it is.
            with at(f"first.{key}"):
                self._make_first(recipe, pool)
        if recipes:
            self._inspect(self.models)

    def _make_first(self, recipe: Recipe, pool: WorkerPool) -> None:
        """Do a run whose student all arms need, here or by a command.

        Raises:
            LimbeckError: it failed.
        """
        from limbeck.pipeline.stage_order import STAGES

        if self.sweep.command is None:
            run_pipeline(
                recipe, stages=STAGES, console=self.console, update=self.checker.update, artifacts=self.artifacts
            )
            return
        outcomes: list[Outcome] = []
        task = Task(recipe=as_tree(recipe), artifacts=str(self.artifacts.root), update=self.checker.update)
        pool.run([task], lambda _: None, lambda _, outcome: outcomes.append(outcome))
        if outcomes[0].state != "done":
            raise LimbeckError(str(outcomes[0].error))

    def run(self) -> SweepEnd:
        import torch

        sweep, threads = self.sweep, torch.get_num_threads()
        own = worker_pool(sweep.parallel, threads, self.artifacts.root, sweep.directory / "workers.log")
        with own if sweep.command is None else command_pool(sweep.command, sweep.parallel) as pool:
            self._run_first(pool)
            table = self._table()
            self._announce(table, threads)
            executor = Executor(
                sweep=sweep,
                console=self.console,
                checker=self.checker,
                table=table,
                artifacts=self.artifacts,
                pool=pool,
            )
            finals = halve(executor, tune(executor, self.models))
            executor.run([run for runs in finals.values() for run in runs])
        return self._end(table)

    def _table(self) -> RunTable:
        """The table of all runs, before tuned values are known."""
        table, arms = RunTable(self.sweep.directory), arms_of(self.sweep)
        table.add([run for arm in arms for run in tuning_runs(self.sweep, arm, self.models)])
        table.add([run for arm in arms for run in final_runs(self.sweep, arm, {}, self.models)])
        return table

    def _announce(self, table: RunTable, threads: int) -> None:
        from limbeck.compare.left_out import left_out

        sweep, runs = self.sweep, [line.run for line in table.lines.values()]
        tuning = sum(run.tuning for run in runs)
        train, limit = runs[0].recipe.train, runs[0].recipe.prompts.limit
        self.console.say(
            f"sweep {sweep.name}: {len(arms_of(sweep))} arms, {len(runs) - tuning} runs"
            + (f" and {tuning} to tune them" if tuning else "")
            + (f" of {train.max_steps} steps" if train.max_steps else f" of {train.num_train_epochs:g} epochs")
            + (f" on at most {limit} prompts" if limit else "")
            + f"; {sweep.parallel} at a time "
            + (
                f"with {max(1, threads // sweep.parallel)} of {threads} threads each"
                if sweep.command is None
                else f"by {sweep.command}"
            )
        )
        if others := left_out(table.root, [record["directory"] for record in table.records()]):
            self.console.say(others)

    def _end(self, table: RunTable) -> SweepEnd:
        from limbeck.compare import write_comparison

        lines = [line for line in table.lines.values() if not line.run.tuning]
        states = {state: sum(line.state == state for line in lines) for state in ("done", "dropped", "failed")}
        said = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        self.console.say(f"sweep {self.sweep.name}: {len(lines)} runs, {said}")
        lost = sum(line.lost for line in table.lines.values())
        if lost:
            how = "their process killed, twice" if self.sweep.command is None else "a command that failed"
            self.console.warn(f"{lost} of the failed runs had {how}; start the sweep again")
        sent = self.sweep.command is not None
        end = SweepEnd(directory=self.sweep.directory, runs=len(lines), failed=states["failed"], lost=lost, sent=sent)
        chosen_by = self.sweep.tune_metric if self.sweep.tune else None
        write_comparison(
            [self.sweep.directory],
            end.page,
            title=self.sweep.name,
            arms=table.records(),
            metric=chosen_by if states["done"] else None,
            replacing=True,
        )
        return end
