"""Sweeps of the tiny pair, played in this process, and runs of their own beside them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.runtime.console import QuietConsole
from limbeck.runtime.files import read_json
from limbeck.sweep.runner import SweepEnd, run_sweep
from tests.tiny_pair import TinyPair

Tree = dict[str, Any]
# Two steps of a second each are enough to tell two objectives apart.
SMALL = {"max_steps": 4, "save_steps": 2}


@dataclass(frozen=True)
class Heard(QuietConsole):
    """Remembers what was said."""

    lines: list[str]

    def say(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Played:
    """A sweep that has come to its end."""

    root: Path
    end: SweepEnd
    said: list[str]

    @property
    def lines(self) -> list[Tree]:
        return read_lines(self.root)

    def state(self, arm: str, seed: int = 0) -> Tree:
        (found,) = [r for r in self.lines if (r["arm"], r["seed"], r["tuning"]) == (arm, seed, False)]
        return found


Play = Callable[..., Played]


def read_lines(root: Path) -> list[Tree]:
    return [json.loads(line) for line in (root / "arms.jsonl").read_text("utf-8").splitlines()]


def recipe_tree(tiny: TinyPair, **sections: Tree) -> Tree:
    """The tiny recipe without a place of its own, shorter and with fewer metrics."""
    defaults = {"train": SMALL, "evaluate": {"groups": ["fidelity"]}}
    tree = tiny.tree(
        Path("unused"), **{key: defaults.get(key, {}) | sections.get(key, {}) for key in {**defaults, **sections}}
    )
    del tree["output_dir"], tree["name"]
    return tree


def made_here(run: Path) -> set[str]:
    """The stages that a run did not take over from another."""
    return {path.stem for path in (run / "stages").glob("*.json") if "shared_from" not in read_json(path)}


def alone(tiny: TinyPair, root: Path, *overrides: str, **sections: Tree) -> Path:
    """The same as a run of its own."""
    tree = recipe_tree(tiny, **sections) | {"output_dir": str(root)}
    return limbeck.run(tree, *overrides).directory


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def require_same_bits(run: Path, separate: Path) -> None:
    names = ["student/model.safetensors", "responses/teacher.jsonl", "scores.json"]
    for pattern in ("samples.jsonl", "scores/*.jsonl"):
        names += [str(path.relative_to(separate)) for path in sorted(separate.glob(pattern))]
    assert len(names) >= 5
    for name in names:
        assert (run / name).read_bytes() == (separate / name).read_bytes(), name
    assert losses(run) == losses(separate)


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> Iterator[None]:
    """A sweep looks for garbage after each run; nobody needs it to look among all that the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def played(tiny: TinyPair) -> Play:
    def run(root: Path, *overrides: str, update: bool = False, recipe: Tree | None = None, **keys: Any) -> Played:
        tree = {"name": "small", "recipe": recipe or recipe_tree(tiny), "output_dir": str(root)} | keys
        console = Heard([])
        end = run_sweep(tree, *overrides, update=update, console=console)
        return Played(root, end, console.lines)

    return run
