"""Forecast of the time that a sweep will still take, from what its finished runs took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from limbeck.runtime.rundir import RunDirectory
from limbeck.sweep.arms import ArmRun
from limbeck.sweep.checks import RunChecker
from limbeck.sweep.status import RunTable

_OF_THE_TEACHER = ("prompts", "respond", "teach")


@dataclass(frozen=True)
class Forecast:
    """Reads the manifests of a sweep's runs: what earlier commands have done counts, too."""

    table: RunTable
    checker: RunChecker
    parallel: int

    def seconds_left(self) -> float | None:
        """Mean cost of a finished run for each that is left, and of the teacher's work where none has done it yet.

        What a run took over from another cost it nothing. None before any run is finished.
        """
        lines = self.table.lines.values()
        done = [line.run for line in lines if line.state == "done"]
        if not done:
            return None
        left = {"waiting": 1.0, "running": 0.5}
        own = [seconds for run in done if (seconds := self._seconds(run, teacher=False)) > 0]
        by_teacher = [seconds for run in done if (seconds := self._seconds(run, teacher=True)) > 0]
        runs = sum(left.get(line.state, 0.0) for line in lines)
        kinds = self._kinds(line.run for line in lines if line.state in left) - self._kinds(done)
        whole = runs * (fmean(own) if own else 0.0) + len(kinds) * (fmean(by_teacher) if by_teacher else 0.0)
        return whole / max(1.0, min(self.parallel, runs))

    def _kinds(self, runs: Iterable[ArmRun]) -> set[str]:
        return {self.checker.signal_fingerprint(run) for run in runs if run.directory in self.checker.prints}

    @staticmethod
    def _seconds(run: ArmRun, *, teacher: bool) -> float:
        directory = RunDirectory(run.directory)
        names = [path.stem for path in (directory.root / "stages").glob("*.json")]
        records = [directory.manifest(name) or {} for name in names if (name in _OF_THE_TEACHER) == teacher]
        return sum(record.get("seconds", 0.0) for record in records if "shared_from" not in record)


def teacher_first(runs: Sequence[ArmRun], checker: RunChecker) -> list[ArmRun]:
    """Runs in their order: first one of each kind of teacher's work, so that different work is done side by side and no
    worker waits for another's while there is other work."""
    first: dict[str, ArmRun] = {}
    for run in runs:
        first.setdefault(checker.signal_fingerprint(run), run)
    leading = [run.directory for run in first.values()]
    return [*first.values(), *(run for run in runs if run.directory not in leading)]
