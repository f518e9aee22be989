"""Playing a sweep: its teacher, what it tunes, its halving rounds, every run that is left, and the comparison.

runs/sweeps/NAME/  sweep.resolved.yaml  arms.jsonl  teacher/  arms/ARM/seed=S/  arms/ARM/tune/KEY=VALUE/  shared/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.api import run as play_recipe
from limbeck.config import at
from limbeck.console import Console, default_console
from limbeck.failures import in_one_line
from limbeck.rundir import RunDirectory, write_text
from limbeck.shelf import Shelf
from limbeck.story import StopWish, Story
from limbeck.sweep.arms import Arm, arms_of, final_runs, first_values, teacher_recipe, tuning_runs
from limbeck.sweep.checks import Inspector, refuse_launcher, refuse_other_files
from limbeck.sweep.crew import crew_of
from limbeck.sweep.ledger import Ledger
from limbeck.sweep.player import Player
from limbeck.sweep.selection import halve, tune
from limbeck.sweep.settings import RESOLVED, Sweep, load_sweep, to_yaml
from limbeck.sweep.worker import ALIVE


@dataclass(frozen=True, kw_only=True)
class SweepEnd:
    """How a sweep ended.

    Attributes:
        runs: that were to be compared, without those that only tuned; the failed among them.
    """

    directory: Path
    runs: int
    failed: int

    @property
    def page(self) -> Path:
        return self.directory / "compare.html"


def play_sweep(
    source: str | Path | Mapping[str, Any],
    *overrides: str,
    update: bool = False,
    console: Console | None = None,
) -> SweepEnd:
    """Play a sweep; what is done in its directory is not done again.

    Args:
        source: what `load_sweep` takes, with its overrides.
        update: redo what was made from other inputs instead of refusing; the old moves aside.
        console: where progress goes; standard error unless given.

    Raises:
        LimbeckError: anything a person can mend before a run has worked, in one line. A run that fails later is shown
            in arms.jsonl, and the others go on.
        KeyboardInterrupt: stopped by a signal; everything finished is on disk.
    """
    refuse_launcher()
    sweep = load_sweep(source, overrides)
    console = console or default_console()
    with in_one_line(), StopWish().installed():
        root = sweep.directory
        refuse_other_files(root)
        conductor = _Conductor(sweep, console, Inspector(update), Shelf(root / "shared"))
        conductor.check()
        with RunDirectory(root).locked(console.warn):
            # Workers of a sweep that was killed end a moment after it.
            with conductor.shelf.claimed(ALIVE):
                write_text(root / RESOLVED, to_yaml(sweep))
            return conductor.play()


@dataclass(frozen=True)
class _Conductor:
    sweep: Sweep
    console: Console
    inspector: Inspector
    shelf: Shelf

    @property
    def teacher(self) -> Path | None:
        """The student of `teacher_run`, where the sweep has one."""
        return None if self.sweep.teacher_run is None else self.sweep.directory / "teacher" / "student"

    def check(self) -> None:
        """Everything that can be refused before a run has worked."""
        recipe, arms = teacher_recipe(self.sweep), arms_of(self.sweep)
        if recipe is None or RunDirectory(recipe.directory).done("student"):
            self._inspect(arms)
            return
        from limbeck.stages import STAGES

        with at("teacher_run"):
            story = Story(recipe)
            for stage in STAGES:
                stage.check(story)
        # What the teacher will have begun as has its tokens and, unless it is cut, its anatomy.
        begins = recipe.student.model if recipe.student.init == "pretrained" else None
        teacher = self.teacher if begins is None else Path(begins)
        for arm in arms:
            runs = tuning_runs(self.sweep, arm, teacher)
            runs += final_runs(self.sweep, arm, first_values(self.sweep), teacher)
            if begins is not None:
                self.inspector.check(runs)

    def _inspect(self, arms: Sequence[Arm]) -> None:
        for arm in arms:
            self.inspector.inspect(tuning_runs(self.sweep, arm, self.teacher))
            if not self.sweep.tune:
                self.inspector.inspect(final_runs(self.sweep, arm, {}, self.teacher))

    def play(self) -> SweepEnd:
        import torch

        sweep, recipe = self.sweep, teacher_recipe(self.sweep)
        if recipe is not None:
            self.console.say("teacher_run: the teacher of all arms comes first")
            play_recipe(recipe, console=self.console, update=self.inspector.update)
            self._inspect(arms_of(sweep))
        ledger, threads = self._ledger(), torch.get_num_threads()
        self._announce(ledger, threads)
        with crew_of(sweep.parallel, threads, self.shelf.root, sweep.directory / "workers.log") as crew:
            player = Player(
                sweep=sweep,
                console=self.console,
                inspector=self.inspector,
                ledger=ledger,
                shelf=self.shelf,
                crew=crew,
            )
            finals = halve(player, tune(player, self.teacher))
            player.play([run for runs in finals.values() for run in runs])
        return self._end(ledger)

    def _ledger(self) -> Ledger:
        """All runs, waiting; what is tuned is not known yet."""
        ledger, arms = Ledger(self.sweep.directory), arms_of(self.sweep)
        ledger.add([run for arm in arms for run in tuning_runs(self.sweep, arm, self.teacher)])
        ledger.add([run for arm in arms for run in final_runs(self.sweep, arm, {}, self.teacher)])
        return ledger

    def _announce(self, ledger: Ledger, threads: int) -> None:
        sweep, runs = self.sweep, [line.run for line in ledger.lines.values()]
        tuning = sum(run.tuning for run in runs)
        train, limit = runs[0].recipe.train, runs[0].recipe.prompts.limit
        self.console.say(
            f"sweep {sweep.name}: {len(arms_of(sweep))} arms, {len(runs) - tuning} runs"
            + (f" and {tuning} to tune them" if tuning else "")
            + (f" of {train.max_steps} steps" if train.max_steps else f" of {train.num_train_epochs:g} epochs")
            + (f" on {limit} prompts" if limit else "")
            + f"; {sweep.parallel} at a time with {max(1, threads // sweep.parallel)} threads each"
        )

    def _end(self, ledger: Ledger) -> SweepEnd:
        lines = [line for line in ledger.lines.values() if not line.run.tuning]
        states = {state: sum(line.state == state for line in lines) for state in ("done", "dropped", "failed")}
        said = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        self.console.say(f"sweep {self.sweep.name}: {len(lines)} runs, {said}")
        return SweepEnd(directory=self.sweep.directory, runs=len(lines), failed=states["failed"])
