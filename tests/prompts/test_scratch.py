"""Prompts in a scratch file are the prompts in memory: same order, splits, counts, lines and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from limbeck.prompts.capped import at_most_heldout
from limbeck.prompts.io import line_of
from limbeck.prompts.scratch import FiledPrompts, ScratchFile, ids_of, lines_of
from limbeck.prompts.sources import PromptSet, load_prompts, with_heldout
from limbeck.types import LimbeckError


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows() -> list[dict[str, Any]]:
    """Texts and conversations; some are asked twice, with the same answer or another."""
    every: list[dict[str, Any]] = []
    for i in range(60):
        turns = [{"role": "user", "content": f"What is {i}\u2028?"}, {"role": "assistant", "content": f"That is {i}."}]
        every.append({"messages": turns if i % 3 else turns[:1]})
    again = [{"messages": [every[i]["messages"][0], {"role": "assistant", "content": "Else."}]} for i in (4, 5)]
    return [*every, *every[10:17], *again]


def same(filed: PromptSet, held: PromptSet) -> None:
    assert isinstance(filed.prompts, FiledPrompts) and isinstance(held.prompts, tuple)
    assert list(filed.prompts) == list(held.prompts)
    assert [prompt.where for prompt in filed.prompts] == [prompt.where for prompt in held.prompts]
    assert list(ids_of(filed.prompts)) == [prompt.id for prompt in held.prompts]
    assert list(lines_of(filed.prompts)) == list(map(line_of, held.prompts))
    assert filed.counts() == held.counts()
    for split in ("train", "heldout"):
        assert list(filed.of(split)) == list(held.of(split))


@pytest.mark.parametrize("limit", [None, 20])
def test_a_scratch_file_holds_what_memory_would(tmp_path: Path, limit: int | None) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows())
    options: dict[str, Any] = {"heldout_fraction": 0.4, "limit": limit}
    caps: tuple[Literal["train", "left_out"], ...] = ("train", "left_out")
    with ScratchFile(tmp_path) as scratch:
        filed, held = load_prompts(source, **options, scratch=scratch), load_prompts(source, **options)
        assert (held.duplicates, held.contradicted) == (9, 2)
        same(filed, held)
        for others in caps:
            same(*(at_most_heldout(loaded, 3, split_seed=0, others=others) for loaded in (filed, held)))
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"], "the scratch file has no name"


def test_two_sources_in_one_file(tmp_path: Path) -> None:
    training = write_rows(tmp_path / "rows.jsonl", rows())

    def both(heldout: str, **options: Any) -> PromptSet:
        trained = load_prompts(training, heldout_fraction=None, **options)
        return with_heldout(trained, load_prompts(heldout, heldout_fraction=1.0, **options))

    other = write_rows(tmp_path / "other.jsonl", [{"prompt": f"And {i}?"} for i in range(9)])
    with ScratchFile(tmp_path) as scratch:
        same(both(other, scratch=scratch), both(other))
    overlapping = write_rows(tmp_path / "both.jsonl", [*rows()[7:9], {"messages": [{"role": "user", "content": "?"}]}])
    messages = []
    with ScratchFile(tmp_path) as scratch:
        for options in ({}, {"scratch": scratch}):
            with pytest.raises(LimbeckError, match=r"both.*, line \d asks what .*rows.*, line .*, so 2 of 3") as caught:
                both(overlapping, **options)
            messages.append(str(caught.value))
    assert messages[0] == messages[1]
