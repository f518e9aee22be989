"""A run whose disk or memory cannot hold it is refused before it works; one that may fit begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.plan import room
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import QuietConsole
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def begin(tree: dict[str, Any], until: str = "respond") -> None:
    run_pipeline(load_recipe(tree), stages=STAGES, until=until, console=QuietConsole())


def with_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * free, free, free))


def test_a_full_disk_is_refused_before_anything(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_disk(monkeypatch, 50_000)
    tree = tiny.tree(tmp_path / "run")
    with pytest.raises(
        LimbeckError, match=r"will write 1.1 MiB and the disk of .* has 49 KiB free.*output_dir"
    ) as said:
        begin(tree, until="train")
    assert "\n" not in str(said.value) and not (tmp_path / "run").exists()
    # Sampling alone writes no checkpoint.
    begin(tree)


def test_a_signal_is_refused_once_the_answers_are_there(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Scored apart, not kept while the teacher samples.
    tree = tiny.tree(tmp_path / "run", teacher={"support": "topk_tail", "support_k": 256}, train={"save_steps": 99})
    begin(tree)
    with_disk(monkeypatch, 150_000)
    with pytest.raises(LimbeckError, match=r"signal \d+ KiB.*lower teacher.support_k"):
        begin(tree, until="train")
    with_disk(monkeypatch, 10_000_000)
    begin(tree, until="train")


def test_what_is_written_is_not_needed_again(tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny.tree(tmp_path / "run")
    begin(tree, until="report")
    with_disk(monkeypatch, 1000)
    begin(tree, until="report")


def test_a_student_beyond_this_machine(tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny.tree(tmp_path / "run")
    monkeypatch.setattr(room, "_memory", lambda context: (100_000, "this machine"))
    with pytest.raises(LimbeckError, match=r"weights, gradients and moments of the student take .*student\.lora"):
        begin(tree, until="train")
    monkeypatch.setattr(room, "_memory", lambda context: (480_000, "this machine"))
    begin(tree, until="train")
