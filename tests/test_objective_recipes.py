"""Objectives of every kind play through the real command, and what their temperature came to is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair

SUM = {"name": "sum", "parts": [{"name": "csd", "weight": 0.5}, {"name": "ce"}, {"name": "hidden", "weight": 0.1}]}


@pytest.mark.parametrize(
    ("objective", "factors"),
    [
        ({"name": "fkl", "temperature": 2.0}, {"fkl": 4.0}),
        ({"name": "tv", "temperature": 2.0}, {"tv": 2.0}),
        ({"name": "rkl", "temperature": 2.0, "temperature_scale": "none"}, {"rkl": 1.0}),
        ({"name": "csd", "first": "teacher", "temperature": 2.0}, {"csd": 1.0}),
        (SUM, {"csd": 1.0}),
    ],
)
def test_the_resolved_factor_is_recorded(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, objective: dict, factors: dict[str, float]
) -> None:
    run = tmp_path / "run"
    tree = tiny.tree(run, train={"max_steps": 2}, evaluate={"groups": ["fidelity"]})
    tree["objective"] = objective
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree), "utf-8")
    done = limbeck.run("run", str(recipe), cwd=tmp_path)
    assert done.code == 0, done.stderr
    recorded = json.loads((run / "stages" / "student.json").read_text("utf-8"))["temperature"]
    assert {name: recorded[name]["factor"] for name in factors} == factors
