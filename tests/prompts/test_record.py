"""prompts.jsonl: what is written is what is read, and a damaged file is said to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.prompts.io import read_prompts, write_prompts
from limbeck.types import LimbeckError, Message, Prompt

TEXT = st.text(max_size=20) | st.sampled_from(["a\u2028b", "\x85", "\r\n", "\ufeff", '"\\'])
MESSAGES = st.lists(st.builds(Message, role=TEXT, content=TEXT), min_size=1, max_size=3).map(tuple)
COMMON = {
    "id": TEXT,
    "completion": st.none() | TEXT,
    "references": st.lists(TEXT, max_size=3).map(tuple),
    "split": st.sampled_from(["train", "heldout"]),
    "category": st.none() | TEXT,
}
PROMPTS = st.builds(Prompt, messages=MESSAGES, **COMMON) | st.builds(
    Prompt, text=TEXT, instruction=st.none() | st.tuples(TEXT, TEXT), **COMMON
)


@given(prompts=st.lists(PROMPTS, max_size=5))
@settings(deadline=None)
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt]) -> None:
    path = tmp_path_factory.mktemp("record") / "prompts.jsonl"
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts
    first = path.read_bytes()
    write_prompts(path, read_prompts(path))
    assert path.read_bytes() == first


def test_without_references_the_file_is_what_it_was_before_there_were_any(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [Prompt(id="a", text="Hi", completion="Hello"), Prompt(id="b", text="Ho", category="")])
    assert path.read_text() == (
        '{"id": "a", "text": "Hi", "completion": "Hello", "split": "train"}\n'
        '{"id": "b", "text": "Ho", "split": "train", "category": ""}\n'
    )


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [Prompt(id="a", text="old")])
    with pytest.raises(UnicodeEncodeError):
        write_prompts(path, [Prompt(id="a", text="new"), Prompt(id="b", text="\ud800")])
    assert read_prompts(path) == [Prompt(id="a", text="old")]
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_changes_only_once_everything_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [Prompt(id="a", text="old")])
    steps = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        steps.append("on disk")

    def replace(source: Path, target: Path) -> None:
        assert read_prompts(source) == [Prompt(id="b", text="new")]
        assert read_prompts(target) == [Prompt(id="a", text="old")]
        steps.append("replaced")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_prompts(path, [Prompt(id="b", text="new")])
    assert steps == ["on disk", "replaced"]


@pytest.mark.parametrize("line", ['{"id": "b", "te', '{"id": "b", "colour": 1}', "[]", '{"text": "no id"}', "3"])
def test_damage_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [Prompt(id="a", text="fine")])
    path.write_text(path.read_text() + line)
    with pytest.raises(LimbeckError, match=r"prompts\.jsonl, line 2 is damaged .*run the same command again"):
        read_prompts(path)


def test_absent_and_undecodable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(LimbeckError, match="does not exist; run the same command again"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LimbeckError, match="is damaged"):
        read_prompts(path)
