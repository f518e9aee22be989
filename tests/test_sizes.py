"""Sizes of files and functions: a bigger one has a reason, which is said here."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES, OF_A_FUNCTION = 250, 50
# Each of these lists the keys of a section, the names of a protocol, or the commands.
LARGEST_FILE = 510
LONG_FUNCTIONS = {
    # One call per key that contradicts another.
    "recipe/response_checks.py:_check_verify",
    # They hand on what they were given, a line per name.
    "training/loop.py:training_run",
    "pipeline/stages/train.py:_run_student",
    "objectives/fused/aligned.py:aligned_distillation_loss",
    "objectives/fused/loss.py:fused_distillation_loss",
    "objectives/fused/loss.py:_row_loss",
    "student/build.py:build_student",
}


def sources() -> list[Path]:
    return sorted((ROOT / "limbeck").rglob("*.py"))


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    said = 0 if docstring is None or docstring.end_lineno is None else docstring.end_lineno - docstring.lineno + 1
    return function.end_lineno - function.lineno + 1 - said


def test_nine_of_ten_files_are_short_and_none_is_endless() -> None:
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in sources()}
    long = [path for path, size in sizes.items() if size > LINES]
    assert len(long) <= len(sizes) / 9, f"{len(long)} of {len(sizes)} files have more than {LINES} lines"
    assert max(sizes.values()) <= LARGEST_FILE, max(sizes, key=lambda path: sizes[path])


def test_functions_are_short_but_for_those_with_a_reason() -> None:
    long = {
        f"{path.relative_to(ROOT / 'limbeck')}:{node.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and own_lines(node) > OF_A_FUNCTION
    }
    assert long == LONG_FUNCTIONS
