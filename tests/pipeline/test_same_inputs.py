"""Run directories that hold something else are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import limbeck
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair


def test_a_directory_of_an_earlier_version_is_refused(tiny: TinyPair, tmp_path: Path) -> None:
    """Its stages had other names, and would all be done again beside what is there."""
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / "recipe.resolved.yaml").write_text("name: run\n", "utf-8")
    (tmp_path / "run" / "stages" / "responses.json").write_text("{}", "utf-8")
    with pytest.raises(LimbeckError, match=r"earlier version of limbeck \(stages/responses.json\); name another"):
        limbeck.run(tiny.tree(tmp_path / "run"))
