"""The record of a server's answers, one JSON line each, on disk before the next is waited for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.rollouts.io import fields_of, response_from_json
from limbeck.runtime.append_log import append_to_log, damaged, read_log
from limbeck.sampling.served import Served
from limbeck.types import LimbeckError, Response


@dataclass
class ServedLog:
    """Answers on disk, by the row of their prompt. A line that a kill cut off is dropped and redone."""

    path: Path
    model: str
    rows: dict[int, Response] = field(default_factory=dict)
    tally: Counter[str] = field(default_factory=Counter)

    @classmethod
    def open(cls, path: Path, *, model: str) -> ServedLog:
        """The log at a path, empty where there is none.

        Args:
            model: the server's name of the model that the log's answers must be by.

        Raises:
            LimbeckError: a damaged line, or answers of another model.
        """
        log = cls(path, model)
        for number, entry in read_log(path):
            try:
                log._count(entry)
                log.rows[entry["row"]] = response_from_json(entry["response"])
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(path, number, error) from None
            if entry["model"] != model:
                raise LimbeckError(
                    f"{path} holds answers of {entry['model']!r}, the server now has {model!r}; serve the former "
                    "again, or name another directory with output_dir=..."
                )
        return log

    def add(self, served: Served) -> None:
        """Append an answer; it is on disk when this returns."""
        entry = {
            "row": served.index,
            "model": self.model,
            "api": served.api,
            "reencoded": served.reencoded,
            "prompt_differs": served.prompt_differs,
            "response": fields_of(served.response),
        }
        append_to_log(self.path, entry)
        self._count(entry)
        self.rows[served.index] = served.response

    def _count(self, entry: dict[str, Any]) -> None:
        self.tally.update({entry["api"]: 1, "reencoded": entry["reencoded"], "prompt_differs": entry["prompt_differs"]})

    def record(self) -> dict[str, Any]:
        """The server's record for the manifest: model, endpoint, and how exact the tokens are."""
        return {
            "model": self.model,
            "api": sorted({"completions", "chat"} & self.tally.keys()),
            "reencoded_from_text": self.tally["reencoded"],
            "prompts_read_otherwise": self.tally["prompt_differs"],
        }
