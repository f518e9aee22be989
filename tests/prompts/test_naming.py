"""Messages name a prompt so that its row can be found."""

from pathlib import Path

import pytest

from limbeck.prompts.io import read_prompts, write_prompts
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.sources import load_prompts
from limbeck.types import Message, Prompt
from tests.tiny_pair import write_prompts as write_rows


def test_the_place_of_a_row_is_kept_but_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}."} for i in range(20)]
    there = load_prompts(str(write_rows(tmp_path / "a.jsonl", rows)), heldout_fraction=0.5)
    turned = load_prompts(str(write_rows(tmp_path / "b.jsonl", rows[::-1])), heldout_fraction=0.5)
    assert there.prompts == turned.prompts
    for prompt, other in zip(there.prompts, turned.prompts, strict=True):
        number = int((prompt.text or "")[4:-1])
        assert prompt.where == f"{tmp_path / 'a.jsonl'}, line {number + 1}"
        assert other.where == f"{tmp_path / 'b.jsonl'}, line {20 - number}"
        assert prompt_label(prompt) == f"{prompt.id} ({prompt.where}: 'Say {number}.')"
    write_prompts(tmp_path / "record.jsonl", there.prompts)
    assert [prompt_label(p) for p in read_prompts(tmp_path / "record.jsonl")] == [
        prompt_label(p) for p in there.prompts
    ]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (Prompt(id="p", text="a\n b\0"), "p ('a b\\x00')"),
        (Prompt(id="p", text="word " * 100_000), "p ('" + "word " * 9 + "wo...')"),
        (
            Prompt(id="p", messages=(Message(role="system", content="s"), Message(role="user", content="u"))),
            "p ('u')",
        ),
        (Prompt(id="p", text="x", where="f.jsonl, line 3"), "p (f.jsonl, line 3: 'x')"),
    ],
)
def test_the_label_is_one_short_line(prompt: Prompt, shown: str) -> None:
    assert prompt_label(prompt) == shown
