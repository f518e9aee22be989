"""The run directory's prompts.jsonl: written whole or not at all, read back exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from limbeck.runtime.files import whole_file
from limbeck.runtime.records import parsed_lines
from limbeck.types import ImageRef, Message, Prompt


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write one JSON object per line, without absent fields. The file appears only when it is whole and on disk."""
    write_lines(path, map(line_of, prompts))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write the lines of `line_of`, likewise."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def line_of(prompt: Prompt) -> str:
    """The line of a prompt in a file of them."""
    return json.dumps(_row(prompt), ensure_ascii=False) + "\n"


def _row(prompt: Prompt) -> dict[str, Any]:
    row = {f.name: value for f in fields(prompt) if (value := getattr(prompt, f.name)) not in (None, (), {})}
    if prompt.messages is not None:
        row["messages"] = [turn.as_turn() for turn in prompt.messages]
    if prompt.answer is not None:
        row["answer"] = prompt.answer.as_turn()
    return row


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts that `write_prompts` wrote.

    Raises:
        LimbeckError: the file is absent or damaged, naming the line.
    """
    return list(StoredPrompts(path))


@dataclass(frozen=True)
class StoredPrompts(Iterable[Prompt]):
    """The prompts that `write_prompts` wrote, read each time they are iterated over: one is in memory and not all.

    Raises:
        LimbeckError: as `read_prompts`, once the damaged line is reached.
    """

    path: Path

    def __iter__(self) -> Iterator[Prompt]:
        return parsed_lines(self.path, prompt_of_line)


def prompt_of_line(line: str) -> Prompt:
    """The prompt of a line of `line_of`."""
    row: dict[str, Any] = json.loads(line)
    if "messages" in row:
        row["messages"] = tuple(_turn(turn) for turn in row["messages"])
    if "answer" in row:
        row["answer"] = _turn(row["answer"])
    if "instruction" in row:
        given, more = row["instruction"]
        row["instruction"] = (given, more)
    row |= {name: tuple(row[name]) for name in ("references", "tools") if name in row}
    return Prompt(**row)


def _turn(turn: Mapping[str, Any]) -> Message:
    more = {name: value for name, value in turn.items() if name not in ("role", "content")}
    content, parts = turn["content"], ()
    if not isinstance(content, str):
        parts = tuple(part["text"] if part["type"] == "text" else ImageRef(id=part["image"]) for part in content)
        content = "\n".join(part for part in parts if isinstance(part, str))
    return Message(role=turn["role"], content=content, fields=more, parts=parts)
