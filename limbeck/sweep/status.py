"""arms.jsonl: the state of every run of a sweep, one line per run; whole and current at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from limbeck.runtime.files import write_text
from limbeck.sweep.arms import ArmRun
from limbeck.types import Json

RunStatus = Literal["waiting", "running", "done", "failed", "dropped"]


@dataclass(kw_only=True)
class RunLine:
    """A run and its state.

    Attributes:
        error: why it failed or was dropped.
        lost: whether it failed because its process was killed, which says nothing of the run.
    """

    run: ArmRun
    state: RunStatus = "waiting"
    error: str | None = None
    lost: bool = False


@dataclass
class RunTable:
    """The lines by directory, in the order of the sweep."""

    root: Path
    lines: dict[Path, RunLine] = field(default_factory=dict)

    def add(self, runs: Sequence[ArmRun]) -> None:
        """Add runs; a run that is already there is replaced (its tuned values are known now)."""
        for run in runs:
            self.lines.setdefault(run.directory, RunLine(run=run)).run = run
        self._write()

    def set(self, run: ArmRun, state: RunStatus, error: str | None = None, *, lost: bool = False) -> None:
        line = self.lines[run.directory]
        line.state, line.error, line.lost = state, error, lost
        self._write()

    def state(self, run: ArmRun) -> RunStatus:
        return self.lines[run.directory].state

    def records(self) -> list[Json]:
        """The lines as JSON; directories relative to the sweep's."""
        return [
            {
                "arm": line.run.arm,
                "seed": line.run.seed,
                "keys": line.run.keys,
                "tuning": line.run.tuning,
                "state": line.state,
                "error": line.error,
                "directory": os.path.relpath(line.run.directory, self.root),
            }
            for line in self.lines.values()
        ]

    def _write(self) -> None:
        write_text(self.root / "arms.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.records()))
