"""The run directory's prompts.jsonl: written whole or not at all, read back exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limbeck.flow import LimbeckError, Message, Prompt
from limbeck.jsonlines import json_lines
from limbeck.rundir import write_text


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """One JSON object a line, absent fields left out. The file appears only when it is whole and on disk."""
    rows = ({name: value for name, value in asdict(prompt).items() if value not in (None, ())} for prompt in prompts)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts that `write_prompts` wrote.

    Raises:
        LimbeckError: the file is absent or damaged, naming the line.
    """
    try:
        data = path.read_text("utf-8")
    except FileNotFoundError:
        raise LimbeckError(f"{path} does not exist; run the stage that writes prompts first") from None
    except UnicodeDecodeError:
        raise LimbeckError(f"{path} is damaged (not UTF-8); delete it and run the same command again") from None
    return [_parse(line, f"{path}, line {number}") for number, line in json_lines(data)]


def _parse(line: str, where: str) -> Prompt:
    try:
        fields: dict[str, Any] = json.loads(line)
        if "messages" in fields:
            fields["messages"] = tuple(Message(**turn) for turn in fields["messages"])
        if "instruction" in fields:
            given, more = fields["instruction"]
            fields["instruction"] = (given, more)
        if "references" in fields:
            fields["references"] = tuple(fields["references"])
        return Prompt(**fields)
    except (ValueError, TypeError) as error:
        raise LimbeckError(f"{where} is damaged ({error}); delete the file and run the same command again") from None
