"""Prompts files with seeded damage: each reads as what it says or is refused with its place named, nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from limbeck.prompts.io import read_prompts, write_prompts
from limbeck.prompts.sources import PromptSet, load_prompts
from limbeck.types import LimbeckError, Prompt

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Rain in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes", "tool_call_id": "abcdefghi", "name": "weather"},
    {"role": "assistant", "content": "It rains.", "reasoning_content": "The tool says so."},
]
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "What is tea?", "completion": ["A drink.", "Leaves."], "category": "food"},
    {"messages": TALK, "tools": [{"type": "function", "function": {"name": "weather"}}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Add", "input": "2, 3", "output": "5"},
    {"instruction": "Add", "instances": [{"input": "2", "output": "3"}, {"input": "4", "output": "5"}]},
    {"question": "2 + 3?", "answer": "5"},
    {"problem": "2 + 3?", "solution": "It is 5."},
)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**30, 1e308, float("nan"), "", " ", "\ud800", "a\u2028b", "\x00", "\ufeff", "x" * 5000),
    *([], {}, [[]], [None], ["a", None], {"a": {}}, [{"role": "user"}], [{"content": "x"}], [CALL], "[", "{}", "[1]"),
)
BYTES = (
    b"\x00",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b",",
    b"\\ud83d",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b" ",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside nested lists and objects."""
    found = [path]
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


def change_a_value(rows: list[Any], rng: random.Random) -> None:
    place = rng.choice(places(rows)[1:])
    inside: Any = rows
    for key in place[:-1]:
        inside = inside[key]
    how = rng.randrange(4)
    if how == 0:
        del inside[place[-1]]
    elif how == 1 and isinstance(inside, dict):
        inside[rng.choice(["role", "content", "prompt", "messages", "tools", "label", "from", "\ud800", "x"])] = (
            rng.choice(VALUES)
        )
    else:
        inside[place[-1]] = rng.choice(VALUES)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data))
        how = rng.randrange(4)
        if how == 0:
            data = data[:start] + data[start + rng.randint(1, 4) :]
        elif how == 1:
            data = data[:start] + rng.choice(BYTES) + data[start:]
        elif how == 2:
            data = data[:start] + bytes([rng.randrange(256)]) + data[start + 1 :]
        else:
            data = data[:start]
        data = data or b" "
    return data


def written(rng: random.Random) -> tuple[str, bytes]:
    """A file of one format with some damage, and the ending of its name."""
    row = json.loads(json.dumps(rng.choice(ROWS)))
    rows: list[Any] = [{**row, "n": n} for n in range(3)]
    for n, one in enumerate(rows):
        key = next(
            key for key in ("prompt", "instruction", "question", "problem", "messages", "conversations") if key in one
        )
        if isinstance(one[key], str):
            one[key] += f" {n}"
        else:
            word = "content" if "content" in one[key][0] else "value"
            one[key][0][word] += f" {n}"
    if rng.random() < 0.6:
        change_a_value(rows, rng)
    if rng.random() < 0.5:
        text = "".join(json.dumps(one, ensure_ascii=rng.random() < 0.5) + "\n" for one in rows)
        suffix = ".jsonl"
    else:
        text, suffix = json.dumps(rows), ".json"
    data = text.encode("utf-8", "surrogatepass")
    return suffix, change_bytes(data, rng) if rng.random() < 0.6 else data


def said(loaded: PromptSet) -> str:
    """Everything that was read, as text that a run directory can hold."""
    return json.dumps([plain(prompt) for prompt in loaded.prompts], ensure_ascii=False)


def plain(prompt: Prompt) -> Any:
    turns = [turn.as_turn() for turn in (*(prompt.messages or ()), *([prompt.answer] if prompt.answer else []))]
    return [prompt.text, prompt.instruction, prompt.completion, prompt.references, prompt.category, turns, prompt.tools]


def texts(value: Any) -> list[str]:
    """Every text inside, numbers and truth values as text too: a category may be one."""
    if not isinstance(value, dict | list | tuple):
        return [str(value)]
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *texts(inner))]
    return [text for inner in value for text in texts(inner)] if isinstance(value, list | tuple) else []


def values(value: Any) -> list[str]:
    """Every text inside that is no name of a field and not nested JSON."""
    if isinstance(value, str):
        return [value] if value[:1] not in ("[", "{") else []
    if isinstance(value, dict):
        return [text for inner in value.values() for text in values(inner)]
    return [text for inner in value for text in values(inner)] if isinstance(value, list) else []


def check(folder: Path, number: int) -> bool:
    """Read one mutant; whether it was read."""
    rng = random.Random(number)
    suffix, data = written(rng)
    path = folder / f"mutant{suffix}"
    path.write_bytes(data)
    try:
        loaded = load_prompts(str(path), heldout_fraction=1.0)
    except LimbeckError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1500, message
        assert message.encode() and path.name in message, message
        return False
    # Whatever was read stands in the file as it was read, and survives the run directory.
    held = {text for row in rows_in(data) for text in texts(row)} | {"None", ""}
    held |= {str(row["category"]) for row in rows_in(data) if "category" in row}
    joined = {f"{a}\n\n{b}" for a in held for b in held} if any(p.instruction for p in loaded.prompts) else set()
    nested = [text for text in held if text[:1] in "[{"]
    for prompt in loaded.prompts:
        for text in texts(plain(prompt)):
            fine = text in held | joined or text in ("role", "content", "user", "assistant", *CALL, *CALL["function"])
            assert fine or any(json.dumps(text)[1:-1] in one for one in nested), (number, text)
    if not loaded.duplicates:
        # And the other way: what is not named as unread was read.
        everything = " ".join(text for prompt in loaded.prompts for text in texts(plain(prompt)))
        for row in rows_in(data):
            for name, value in row.items():
                named = [key for key in loaded.unread if key == name or key.startswith(f"{name}.")]
                if not named:
                    assert all(text.strip() in everything for text in values(value)), (number, name, value)
    write_prompts(folder / "prompts.jsonl", loaded.prompts)
    assert said(loaded) == json.dumps([plain(p) for p in read_prompts(folder / "prompts.jsonl")], ensure_ascii=False)
    return True


def rows_in(data: bytes) -> list[Any]:
    """The rows of a file by a reader of its own."""
    text = data.decode("utf-8").removeprefix("\ufeff")
    if text.lstrip(" \t\r\n\ufeff").startswith("["):
        found = json.loads(text)
        return found if isinstance(found, list) else [found]
    return [json.loads(line) for line in text.split("\n") if line.strip(" \t\r\n\x0b\x0c")]


def test_mutants_read_as_what_they_say_or_are_refused(tmp_path: Path) -> None:
    read = [check(tmp_path, number) for number in (*range(600), 5721)]
    assert 100 < sum(read) < 500
