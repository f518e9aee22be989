"""What a stage is given: facts about both models, read without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from limbeck.pipeline.context import RunContext
from limbeck.recipe.load import load_recipe
from tests.tiny_pair import TinyPair, write_model


def test_window_is_the_smaller_one(tiny: TinyPair, tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", window=64, layers=2)
    section = {"model": str(student), "init": "pretrained", "layers": None}
    windows: list[Callable[[], int | None]] = []
    for sections in (
        {},
        {"student": section},
        {"student": section | {"init": "scratch", "config": {"max_position_embeddings": 32}}},
    ):
        context = RunContext(load_recipe(tiny.tree(tmp_path / "run", **sections)))
        windows.append(lambda context=context: context.window)
    assert [window() for window in windows] == [128, 64, 32]
