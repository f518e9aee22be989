"""Marks of the answers to the problems of a task, as records and as rows of metrics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set

from limbeck.evaluation.context import Who
from limbeck.evaluation.tasks.passk import pass_at_k
from limbeck.evaluation.tasks.problems import CODE, TaskName
from limbeck.types import Json, ScoredRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
    """One task: which answers to each problem are right, and what was wrong with the others."""

    right: Mapping[str, Sequence[bool]]
    failures: Counter[str]
    extraction: Counter[str]

    def of(self, ids: Set[str]) -> Graded:
        """The same of some problems."""
        return dataclasses.replace(self, right={id: marks for id, marks in self.right.items() if id in ids})

    def record(self, problems: int) -> Json:
        """What the details of the group say.

        Args:
            problems: how many there were, some of them too long.
        """
        return {
            "too_long": problems - len(self.right),
            "answers": sum(len(marks) for marks in self.right.values()),
            "right": sum(sum(marks) for marks in self.right.values()),
            "failures": dict(self.failures),
            "extraction": dict(self.extraction),
        }


def tables_of(
    name: str, task: TaskName, graded: Mapping[Who, Graded], pass_at: Sequence[int]
) -> dict[str, list[ScoredRow]]:
    """The accuracy of maths is the mean over the answers, which is pass@1; k above 1 is estimated for all tasks."""
    prefix: dict[Who, str] = {"student": "", "teacher": "teacher_"}
    ids = list(graded["student"].right)

    def rows(metric: str, value: Callable[[Sequence[bool]], float]) -> list[ScoredRow]:
        return [
            ScoredRow(
                id=id,
                weight=1.0,
                values={f"{prefix[who]}{metric}": value(one.right[id]) for who, one in graded.items()},
            )
            for id in ids
        ]

    tables: dict[str, list[ScoredRow]] = {}
    if task not in CODE:
        tables[name] = rows("accuracy", lambda marks: sum(marks) / len(marks))
    for k in pass_at:
        if task in CODE or k > 1:
            tables[f"{name},k={k}"] = rows("pass_at_k", lambda marks, k=k: pass_at_k(len(marks), sum(marks), k))
    return tables
