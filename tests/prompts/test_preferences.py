"""Rows of preference data: one prompt with two answers, whatever the format; what is none is refused by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.prompts.preferences import read_preferences
from limbeck.prompts.sources import canonical_content, split_of
from limbeck.types import LimbeckError

USER, GOOD, BAD = ({"role": "user", "content": "Why?"}, *({"role": "assistant", "content": c} for c in ("So.", "No.")))
FORMATS: tuple[dict[str, Any], ...] = (
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    # UltraFeedback's binarized form, with columns that belong to others.
    {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD], "score_chosen": 9.0},
    {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."},
    {"question": "Why?", "chosen": "So.", "rejected": "No."},
)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("row", FORMATS)
def test_a_row_of_each_format(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read_preferences(write(tmp_path / "p.jsonl", row), heldout_fraction=1e-9)
    ((chosen, rejected),) = found.rows
    assert (chosen.completion, rejected.completion) == ("So.", "No.")
    assert chosen.id == rejected.id and canonical_content(chosen) == canonical_content(rejected)
    assert chosen.where is not None and chosen.where.endswith("p.jsonl, line 1")


@pytest.mark.parametrize(
    ("row", "said"),
    (
        (
            {"prompt": "a", "chosen": "b"},
            r"line 2: nothing in 'rejected' \(the fields are chosen, prompt\).*repair",
        ),
        ({"prompt": "a", "completion": "b"}, r"line 2: nothing in 'chosen'.*preference\.pairs=teacher"),
        ({"prompt": "a", "chosen": "b", "rejected": " b "}, r"line 2: .* one answer twice; .*identical=drop"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, r"line 2: 'rejected' is blank"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, r"line 2: got 3 in 'rejected', expected text or a list"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": 3}]},
            r"line 2: .*\(the answer in 'rejected'\)",
        ),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Who?"}, BAD]}, "line 2: .*different prompts"),
        ({"chosen": "b", "rejected": "c"}, "line 2: "),
    ),
)
def test_a_row_that_is_none_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(LimbeckError, match=said):
        read_preferences(write(tmp_path / "p.jsonl", FORMATS[0], row), heldout_fraction=0.5)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"Why {i}?", "chosen": "So.", "rejected": "So." if i % 5 == 0 else "No."} for i in range(40)]
    source = write(tmp_path / "p.jsonl", *rows)
    found = read_preferences(source, heldout_fraction=0.25, split_seed=3, identical="drop")
    assert found.identical == 8
    assert len(found.rows) + found.heldout + found.identical == 40 and found.heldout
    assert {split_of(canonical_content(chosen), 0.25, 3) for chosen, _ in found.rows} == {"train"}
    with pytest.raises(LimbeckError, match="none of 1 rows gives a pair"):
        read_preferences(write(tmp_path / "q.jsonl", rows[0]), heldout_fraction=0.25, identical="drop")
