"""The student beside models that were quantised without training: every metric that both have, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.report.before_after import evidence, stand_ins
from limbeck.report.format import figure, interval_of
from limbeck.report.read_run import Run, score

# Of this the value of a column is about the column's loss, and that of the student about its own before training.
RECOVERED = "recovered"
# A value with its interval, both empty where it was not measured.
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInLine:
    """One metric of all columns."""

    label: str
    unit: str
    teacher: str
    stand_ins: tuple[Cell, ...]
    before: Cell
    after: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInTable:
    """The section.

    Attributes:
        columns: headings of the stand-ins.
        shares: whether the last line says what training brought back of each column's loss.
    """

    columns: tuple[str, ...]
    lines: tuple[StandInLine, ...]
    shares: bool


def stand_in_table(run: Run) -> StandInTable | None:
    """The section's content; None where the student alone was measured."""
    names, lines, shares = stand_ins(run), list[StandInLine](), list[StandInLine]()
    for line in evidence(run):
        found = tuple(_cell(run, named(line.name, name)) for name in names)
        if not any(value for value, _ in found):
            continue
        before, after = (line.before, line.before_interval), (line.after, line.after_interval)
        share = line.name == RECOVERED
        (shares if share else lines).append(
            StandInLine(
                label=line.label,
                unit=line.unit,
                teacher="" if share else line.teacher,
                stand_ins=found,
                before=after if share else before,
                after=("", "") if share else after,
            )
        )
    if not lines and not shares:
        return None
    columns = tuple(f"{text[:1].upper()}{text[1:]}" for text in names.values())
    return StandInTable(columns=columns, lines=(*lines, *shares), shares=bool(shares))


def named(metric: str, stand_in: str) -> str:
    """Name of a metric of a stand-in."""
    return f"{metric}{',' if '@' in metric else '@'}{stand_in}"


def _cell(run: Run, name: str) -> Cell:
    found = score(run, "after", name)
    return ("", "") if found is None else (figure(found["mean"]), interval_of(found))
