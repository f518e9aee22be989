"""A student pruned in width through the real command: cut once, the same after a kill, saved and planned."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan.case import student_size
from limbeck.recipe.load import load_recipe
from tests.limbeck_command import CommandServer, KillAt
from tests.pipeline.test_bad_input import refused
from tests.tiny_pair import TinyPair

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
STUDENT: dict[str, Any] = {"init": "width_prune", "layers": 2, "width": SIZES}


def test_it_is_cut_once_and_trained_as_any_other(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    finished = limbeck.run("run", tiny.recipe(whole, student=STUDENT))
    assert finished.code == 0, finished.stderr
    model = AutoModelForCausalLM.from_pretrained(whole / "student")
    config = model.config
    assert {name: getattr(config, name) for name in SIZES} == SIZES
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    found = json.loads((whole / "student/student.json").read_text())
    assert found["width"] == SIZES
    assert set(found["width_importance"]) == set(SIZES)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    planned = student_size(RunContext(load_recipe(whole.with_suffix(".yaml"))))
    assert planned.model.parameters == found["parameters"]
    assert planned.model.query == 16
    # Killed at the choice and in the training, it ends with the same weights.
    recipe = tiny.recipe(run, student=STUDENT)
    for name, before in (("blocks.json", 0), ("checkpoints/step-000002", 0)):
        killed = limbeck.run("train", recipe, killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, killed.stderr
    assert limbeck.run("train", recipe).code == 0
    for name in ("blocks.json", "student/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_choice_is_another_student(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    student = {**STUDENT, "layers": None, "width": {"intermediate_size": 40}, "keep": [0, 2]}
    recipe = tiny.recipe(run, student=student, train={"max_steps": 2})
    assert limbeck.run("train", recipe).code == 0
    choice = json.loads((run / "blocks.json").read_text())
    assert choice["keep"] == [0, 2]
    assert [len(kept) for kept in choice["width"]["neurons"]] == [40, 40]
    narrower = tiny.recipe(run, student={**student, "width": {"intermediate_size": 32}}, train={"max_steps": 2})
    refused(limbeck.run("train", narrower), "made by another recipe", "student.width.intermediate_size")
    choice["width"]["neurons"] = "many"
    damaged = tmp_path / "damaged"
    again = tiny.recipe(damaged, student=student)
    killed = limbeck.run("train", again, killed=KillAt(damaged, "checkpoints/step-000002", 0))
    assert killed.code == -signal.SIGKILL, killed.stderr
    (damaged / "blocks.json").write_text(json.dumps(choice))
    refused(limbeck.run("train", again), "blocks.json is damaged", "delete it")


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"width": {"hidden_size": 32}}, "student.width.hidden_size is 32; the model has 32"),
        ({"width": {"num_attention_heads": 3}}, "so expected 2"),
        ({"width": {"hidden_size": 25}}, "student.width={'hidden_size': 25} is refused"),
        ({"width": None}, "student.init=width_prune needs student.width with hidden_size"),
        ({"width": {}}, "student.init=width_prune needs student.width with hidden_size"),
        (
            {"keep": [0, 2]},
            "student.init=width_prune reads student.layers (how many) or student.keep (which), not both",
        ),
        ({"init": "depth_prune"}, "student.width belongs to init width_prune, not to init depth_prune"),
        ({"width": {"mlp": 3}}, "student.width.mlp"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, student: dict[str, Any], said: str
) -> None:
    recipe = tiny.recipe(tmp_path / "run", student={**STUDENT, **student})
    refused(limbeck.run("run", recipe), said)
