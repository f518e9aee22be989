"""What the checks before the training warn of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.pipeline.checks import check_student
from limbeck.pipeline.context import RunContext
from limbeck.recipe.load import load_recipe
from tests.tiny_pair import TinyPair, write_model, write_prompts

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("family", "student", "experts"),
    [("mixtral", {}, 8), ("qwen3_moe", {}, 128), ("mixtral", {"lora": ATTENTION}, 0), ("llama", {}, 0)],
)
def test_a_mixture_of_experts_is_trained_without_its_balancing_loss(
    family: str, student: dict[str, Any], experts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    pair = TinyPair(teacher=write_model(tmp_path / "teacher", family=family, width=16, layers=3), prompts=prompts)
    check_student(RunContext(load_recipe(pair.tree(tmp_path / "run", student=student))))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    warned = f"warning: the student is a mixture of {experts} experts, and the loss that spreads tokens evenly"
    assert [line[: len(warned)] for line in said] == ([warned] if experts else [])
