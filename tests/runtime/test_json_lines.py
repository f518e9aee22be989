"""JSON lines end at a line feed alone, wherever they are read."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import limbeck
from limbeck.evaluation.scores.files import read_rows, write_rows
from limbeck.prompts.io import read_prompts, write_prompts
from limbeck.rollouts.io import read_responses, write_responses
from limbeck.runtime.json_lines import json_lines
from limbeck.types import Prompt, Response, ScoredRow

SEPARATORS = "\u0085\u2028\u2029\x0b\x0c\x1c\x1d\x1e"
PACKAGE = Path(limbeck.__file__).parent
# What is no JSON: a docstring, what programs, a compiler and the kernel say; and bytes, which end at a line feed.
OTHER_TEXT = {
    "registry.py",
    "cli.py",
    "ops/onednn.py",
    "objectives/fused/body.py",
    "runtime/memory.py",
    "models/assets.py",
    "models/quiet.py",
    "runtime/append_log.py",
}


def test_numbers_count_blank_lines() -> None:
    assert list(json_lines('{"a": 1}\n\n  \n{"b": "x\u2028y"}\r\n')) == [(1, '{"a": 1}'), (4, '{"b": "x\u2028y"}\r')]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_what_is_written_is_read(tmp_path: Path, separator: str) -> None:
    text, path = f"one{separator}two", tmp_path / "x.jsonl"
    prompts = [Prompt(id=text, text=text), Prompt(id="b", text="b")]
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts
    responses = [Response(prompt_id=text, author="data", prompt_ids=(1,), response_ids=(2,), stop="eos")] * 2
    write_responses(path, responses)
    assert read_responses(path) == responses
    rows = [ScoredRow(id=text, weight=1.0, values={"rouge_l": 0.5})]
    write_rows(path, rows)
    assert read_rows(path) == rows
    path.write_text(json.dumps({"id": text, "weight": 1.0, "rouge_l": 0.5}, ensure_ascii=False) + "\n", "utf-8")
    assert read_rows(path) == rows


@pytest.mark.parametrize("value", ["NaN", "1e999", "true", '"x"', "1" + "0" * 400, "null"])
def test_a_metric_is_a_finite_number(tmp_path: Path, value: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"id": "a", "weight": 1.0, "rouge_l": {value}}}\n')
    with pytest.raises(limbeck.LimbeckError, match=r"x\.jsonl:1: got a line that is no scored row"):
        read_rows(path)


def test_nobody_cuts_json_lines_another_way() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    }
    assert found <= OTHER_TEXT
