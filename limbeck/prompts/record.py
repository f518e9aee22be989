"""The run directory's prompts.jsonl: written whole or not at all, read back exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limbeck.flow import LimbeckError, Message, Prompt


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """One JSON object a line, fields that are None left out. The file appears only when it is whole and on disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for prompt in prompts:
                fields = {name: value for name, value in asdict(prompt).items() if value is not None}
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(data.split("\n"), start=1) if line]


def _parse(line: str, where: str) -> Prompt:
    try:
        fields: dict[str, Any] = json.loads(line)
        if "messages" in fields:
            fields["messages"] = tuple(Message(**turn) for turn in fields["messages"])
        if "instruction" in fields:
            given, more = fields["instruction"]
            fields["instruction"] = (given, more)
        return Prompt(**fields)
    except (ValueError, TypeError) as error:
        raise LimbeckError(f"{where} is damaged ({error}); delete the file and run the same command again") from None
