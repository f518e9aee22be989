"""Prompts in tokens that stay on disk."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from limbeck.rollouts.asked import (
    PromptTable,
    ids_of,
    joined,
    keep_asked,
    lengths_of,
    of_split,
    open_asked,
    scratch_table,
    with_ids,
)
from limbeck.rollouts.io import read_asked
from limbeck.types import LimbeckError, TokenPrompt


def prompts(count: int = 9000) -> list[TokenPrompt]:
    """More than two batches of rows, of all kinds."""
    return [
        TokenPrompt(
            id=f"p{i}",
            ids=tuple(range(i % 7, i % 7 + 1 + i % 5)),
            split="heldout" if i % 10 == 0 else "train",
            label=f"row {i}" if i % 2 else "",
            images=(f"image{i}",) if i % 100 == 0 else (),
        )
        for i in range(count)
    ]


def labelled(found: object) -> list[tuple[TokenPrompt, str]]:
    return [(prompt, prompt.label) for prompt in found]  # type: ignore[attr-defined]


def test_a_table_is_the_prompts(tmp_path: Path) -> None:
    expected = prompts()
    table = scratch_table(tmp_path, iter(expected))
    assert not list(tmp_path.iterdir()), "its file has no name"
    assert labelled(table) == labelled(expected) and len(table) == len(expected)
    assert [table[0], table[4095], table[4096], table[-1]] == [expected[i] for i in (0, 4095, 4096, -1)]
    assert labelled(table[4000:4200]) == labelled(expected[4000:4200])


def test_what_is_taken_of_a_table_is_what_is_taken_of_a_list(tmp_path: Path) -> None:
    every = prompts()
    table = scratch_table(tmp_path, every)
    held, train = of_split(table, "heldout"), of_split(table, "train")
    assert isinstance(held, PromptTable) and list(held) == list(of_split(every, "heldout"))
    assert list(of_split(train[:50], "heldout")) == []
    both = joined(train[:100], held)
    assert isinstance(both, PromptTable) and list(both) == [*train[:100], *held]
    some = with_ids(both, lambda name: name.endswith("1"))
    assert isinstance(some, PromptTable) and list(some) == list(with_ids(list(both), lambda name: name.endswith("1")))
    assert list(ids_of(some)) == [prompt.id for prompt in some] == list(ids_of(list(some)))
    assert lengths_of(some).tolist() == [len(prompt.ids) for prompt in some] == lengths_of(list(some)).tolist()
    assert joined([every[0]], held[:1]) == [every[0], held[0]], "of two kinds, in memory"


def test_those_of_a_run_are_for_people_too_and_of_older_runs_without_columns(tmp_path: Path) -> None:
    expected, path = prompts(50), tmp_path / "asked.jsonl"
    keep_asked(path, expected)
    assert read_asked(path) == expected == list(open_asked(path))
    (tmp_path / "asked.arrow").unlink()
    assert open_asked(path) == expected


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    keep_asked(path, prompts(50))
    columns = tmp_path / "asked.arrow"
    columns.write_bytes(columns.read_bytes()[:-200])
    with pytest.raises(LimbeckError, match=r"asked\.arrow is damaged .* delete .*asked\.arrow and run the same"):
        open_asked(path)


def test_few_are_in_memory_at_a_time(tmp_path: Path) -> None:
    def many() -> object:
        return (TokenPrompt(id=f"{i:016x}", ids=tuple(range(1000, 1700))) for i in range(6000))

    tracemalloc.start()
    table = scratch_table(tmp_path, many())  # type: ignore[arg-type]
    total = sum(len(prompt.ids) for prompt in table)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All of them would be 150 MB: 700 integers of Python's own in each.
    assert total == 6000 * 700 and peak < 80 << 20
