"""Columns that are not read are named, those of methods not implemented are refused, and both can be ignored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from limbeck.prompts.columns import UNPLAYED, unread_line
from limbeck.prompts.sources import PromptSet, load_prompts
from limbeck.types import LimbeckError

ANSWERED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def load(tmp_path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> PromptSet:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_prompts(str(path), heldout_fraction=1.0, **options)


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"prompt": "Hi", "completion": "Hello", "score": 3, "note": None, "tags": []}, ["score"]),
        ({"prompt": "Hi", "prompt_id": "7", "messages": ANSWERED}, ["prompt", "prompt_id"]),
        ({"problem": "2 + 3?", "solution": "It is 5.", "answer": "5", "category": "sums"}, ["answer"]),
        ({"instruction": "Add", "input": "2", "output": "5", "response": "6"}, ["response"]),
        (
            {"instruction": "Add", "instances": [{"input": "2", "note": "x", "output": "3", "response": "4"}]},
            ["instances.note", "instances.response"],
        ),
        ({"messages": [{**ANSWERED[0], "mood": "calm"}, ANSWERED[1]]}, ["messages.mood"]),
        ({"messages": ANSWERED, "tools": [{"type": "function", "function": {"name": "f"}}]}, []),
        ({"prompt": "Hi", "label": 3}, ["label"]),
    ],
)
def test_what_nobody_reads_is_counted(tmp_path: Path, row: dict[str, Any], unread: list[str]) -> None:
    assert dict(load(tmp_path, [row]).unread) == dict.fromkeys(unread, 1)


def test_columns_beside_mapped_ones_are_counted(tmp_path: Path) -> None:
    loaded = load(tmp_path, [{"q": "Hi", "a": "Hello", "b": 1}], fields={"prompt": "q", "completion": "a"})
    assert dict(loaded.unread) == {"b": 1}


def test_the_line_names_each_once_and_where_it_is_rare() -> None:
    assert unread_line({"score": 3, "note": 1}, 3) == "prompts: columns that are not read: score, note (in 1 of 3 rows)"
    assert unread_line({"a\ud800": 1}, 1).isascii()
    assert unread_line({str(n): 1 for n in range(20)}, 1).endswith("11 and 8 more")


@pytest.mark.parametrize("name", UNPLAYED)
def test_columns_of_methods_that_are_not_played_are_refused_or_ignored(tmp_path: Path, name: str) -> None:
    row = {"prompt": "Hi", name: True}
    with pytest.raises(
        LimbeckError, match=rf"data.jsonl, line 1: the column '{name}' .*prompts.ignore_columns=\[{name}"
    ):
        load(tmp_path, [row])
    assert not load(tmp_path, [row], ignore_columns=[name]).unread
    assert load(tmp_path, [{"prompt": "Hi", name: None}]).prompts


def test_weights_of_turns_are_refused_or_ignored(tmp_path: Path) -> None:
    row = {"messages": [ANSWERED[0], {**ANSWERED[1], "weight": 0}]}
    with pytest.raises(LimbeckError, match=r"the column 'messages.weight' says which turns to train on"):
        load(tmp_path, [row])
    assert load(tmp_path, [row], ignore_columns=["messages.weight"]).prompts[0].completion == "Hello"


def test_what_is_read_can_be_ignored_too(tmp_path: Path) -> None:
    row = {"messages": ANSWERED, "tools": [{"name": "f"}]}
    assert load(tmp_path, [row]).prompts[0].tools
    assert not load(tmp_path, [row], ignore_columns=["tools"]).prompts[0].tools


def test_ignoring_what_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match="ignore_columns names 'imgaes', which no row of the data has"):
        load(tmp_path, [{"prompt": "Hi"}], ignore_columns=["imgaes"])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "us\ud800er", "content": "Hi"}]},
        {"prompt": "Hi", "category": "\udfff"},
        {"messages": ANSWERED, "tools": [{"name": "\ud800"}]},
        {"messages": [ANSWERED[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"\ud800": 1}}]}]},
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(LimbeckError, match=r"line 1: .* half of a surrogate pair"):
        load(tmp_path, [row])


def test_half_a_surrogate_pair_in_a_name_reaches_no_message(tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match="got the fields") as caught:
        load(tmp_path, [{"a\ud800": "Hi"}])
    assert str(caught.value).encode()


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": "a", "prompt": "b"}\n')
    with pytest.raises(LimbeckError, match=r"line 2: .*prompt stands there twice"):
        load_prompts(str(path), heldout_fraction=0.5)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b"])
def test_line_marks_inside_a_text_end_no_line(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": f"a{mark}b"}, ensure_ascii=False) + "\n", "utf-8")
    assert load_prompts(str(path), heldout_fraction=1.0).prompts[0].text == f"a{mark}b"
