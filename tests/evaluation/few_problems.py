"""Problems as their files have them, one or two of each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GSM8K = [
    {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "What is 1000 + 1?", "answer": "#### 1,001"},
]
MATH = [{"problem": "Half of $x$?", "solution": "It is $\\boxed{\\frac{x}{2}}$.", "unique_id": "a/1"}]
HUMANEVAL = [
    {
        "task_id": "T/0",
        "prompt": 'from math import gcd\n\n\ndef one(n):\n    return 1\n\n\ndef add(a, b):\n    """Add."""\n',
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert one(candidate(0, 0)) == 1\n",
    }
]
MBPP = [
    {
        "task_id": 2,
        "text": "Write a function to build a chain.",
        "code": "import math\r\nclass Pair(object):\r\n    def __init__(self, a):\r\n        self.a = a\r\n"
        "def sum(pairs):\r\n    return math.fsum(p.a for p in pairs)\r\n",
        "test_list": ["assert sum([Pair(1), Pair(2)]) == 3", "assert math.isclose(sum([one]), 1.0)"],
        "test_setup_code": "one = Pair(1)",
        "challenge_test_list": ["assert False"],
    }
]
ROWS: dict[str, list[dict[str, Any]]] = {"gsm8k": GSM8K, "math": MATH, "humaneval": HUMANEVAL, "mbpp": MBPP}


def write(folder: Path, task: str, rows: Sequence[Any] | None = None) -> Path:
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[task] if rows is None else rows)), "utf-8")
    return path


BODY = "    return a + b\n"
WHOLE = "def add(a, b):\n" + BODY
