"""Problems as prompts: their answers can be checked, in training as in evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.evaluation.tasks.generators import ProblemGenerator
from limbeck.evaluation.tasks.problems import Problem, TaskName, problem_of
from limbeck.prompts.readers import PlacedRow
from limbeck.runtime.files import whole_file
from limbeck.runtime.records import parsed_lines
from limbeck.types import Prompt


@dataclass
class ProblemReader:
    """Reads the rows of a source as problems of a task, and remembers them by what they ask."""

    task: TaskName
    _by_request: dict[str, Problem] = field(default_factory=dict)

    def as_prompt(self, placed: PlacedRow) -> Mapping[str, Any]:
        """A row of prompt and completion for a problem; of two that ask the same, the first one counts.

        Raises:
            LimbeckError: the row is no problem of the task, or has no answer; names its place.
        """
        problem = problem_of(self.task, placed.row, placed.where, len(self._by_request) + 1)
        self._by_request.setdefault(problem.request, problem)
        return {"prompt": problem.request, "category": problem.category or self.task} | (
            {"completion": problem.solution} if problem.solution else {}
        )

    def write(self, path: Path, prompts: Sequence[Prompt]) -> None:
        """One JSON object a line: the id of a prompt and its problem."""
        with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
            for prompt in prompts:
                row = {"prompt_id": prompt.id, **asdict(self._by_request[prompt.text or ""])}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def generated_rows(generator: ProblemGenerator) -> Iterator[PlacedRow]:
    """The rows that a generator makes, each with its number."""
    for number, row in enumerate(generator.rows(), start=1):
        yield PlacedRow(row, f"generated problem {number}")


def read_prompt_problems(path: Path) -> dict[str, Problem]:
    """The problems that `ProblemReader.write` wrote, by the ids of their prompts.

    Raises:
        LimbeckError: the file is absent or damaged, naming the line.
    """
    return dict(parsed_lines(path, _parse))


def _parse(line: str) -> tuple[str, Problem]:
    row = json.loads(line)
    prompt_id = row.pop("prompt_id")
    return prompt_id, Problem(**row | {"names": tuple(row["names"])})
