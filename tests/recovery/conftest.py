"""What an uninterrupted run leaves behind, to compare interrupted ones with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import Command, CommandServer
from tests.tiny_pair import TinyPair

# Metrics that differ between two runs of the same.
CLOCKS = ("seconds", "tokens_per_s", "writing_seconds")


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        seconds: that it took.
    """

    root: Path
    seconds: float

    def check(self, root: Path) -> None:
        """The other run ended exactly like this one."""
        for name in ("student/model.safetensors", "scores.json", "samples.jsonl", "responses/teacher.jsonl"):
            assert (root / name).read_bytes() == (self.root / name).read_bytes(), name
        assert losses(root) == losses(self.root)
        assert measured(root) == measured(self.root)
        written = sorted(path.relative_to(self.root) for path in self.root.glob("rounds/**/*.jsonl"))
        assert written == sorted(path.relative_to(root) for path in root.glob("rounds/**/*.jsonl"))
        for name in written:
            assert (root / name).read_bytes() == (self.root / name).read_bytes(), name
        assert not [path for path in root.rglob("*") if path.name.endswith(".partial")]
        assert not (root / "superseded").exists()


def losses(root: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of the metrics."""
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["step"], line["loss"]) for line in lines]


def measured(root: Path) -> list[dict[str, Any]]:
    """All lines of the metrics, those of a first stage too, without what a clock says."""
    paths = [path for path in (root / "metrics.sft.jsonl", root / "metrics.jsonl") if path.exists()]
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


@dataclass
class Sampled:
    """Watches that no response is sampled twice: a batch that exists is never written again."""

    root: Path
    seen: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def look(self) -> None:
        patterns = ("responses/batches/[0-9]*.jsonl", "rounds/[0-9]*/*/[0-9]*.jsonl")
        now = {path: path.stat() for pattern in patterns for path in self.root.glob(pattern)}
        found = {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in now.items()}
        assert self.seen.items() <= found.items()
        self.seen = found


def catch(start: Callable[[Path], Command], root: Path, happened: Callable[[Path], bool]) -> tuple[Command, Path]:
    """A command that is running when something has just happened in its run directory.

    The machine may be so busy that the command ends before anybody looks: then it is tried again, elsewhere.
    """
    for attempt in range(5):
        folder = root / str(attempt)
        command = start(folder)
        if command.wait_until(lambda folder=folder: happened(folder)) and not command.ended():
            return command, folder
        assert command.wait().code == 0
    raise AssertionError("the command always ended first")


@pytest.fixture(scope="session")
def reference(limbeck: CommandServer, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run that nothing interrupts."""
    root = tmp_path_factory.mktemp("reference") / "run"
    recipe = tiny.recipe(root)
    started = time.monotonic()
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    return Reference(root, time.monotonic() - started)
