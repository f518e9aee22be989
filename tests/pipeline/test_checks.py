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


@pytest.mark.parametrize(
    ("family", "format", "warned"),
    [("mistral", "q4_0", True), ("mistral", "int4_g32", False), ("llama", "q4_0", False)],
)
def test_a_student_on_the_grid_of_a_file_that_it_cannot_become_is_warned_of(
    family: str, format: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    pair = TinyPair(teacher=write_model(tmp_path / "teacher", family=family), prompts=prompts)
    tree = pair.tree(tmp_path / "run") | {"student": {"init": "teacher", "quantize": {"format": format}}}
    check_student(RunContext(load_recipe(tree)))
    said = capsys.readouterr().err
    assert ("the student will not become a GGUF file: mistral models cannot be exported" in said) is warned
