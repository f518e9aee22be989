"""The rows of all runs, table by table (a group of metrics under a condition), as columns of comparable arms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from limbeck.compare.comparability import ExcludedRun, difference, rows_may_lack, settings_of
from limbeck.compare.runs import ComparedArm, ComparedRun, Comparison
from limbeck.compare.uncertainty import Resampled, ResampledMetric, draws
from limbeck.evaluation.scores.bootstrap import RESAMPLES, Table
from limbeck.evaluation.scores.files import read_rows
from limbeck.evaluation.scores.metrics import Metric, describe_metric, known_metrics
from limbeck.evaluation.scores.pooled import LIFTED, POOLED
from limbeck.report.read_run import value_at
from limbeck.types import LimbeckError, ScoredRow

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of all arms that may be compared by it.

    Attributes:
        arms: the arms by number in the sheet.
        places: of each run of the sheet, its directory.
        resampled: estimates and differences of the metric itself.
        ranked: the same of the value that arms are ranked by: the distance from the teacher's where the metric is best
            near it, else the metric.
        n: examples.
    """

    name: str
    about: Metric
    arms: tuple[ComparedArm, ...]
    places: tuple[str, ...]
    resampled: Resampled
    ranked: Resampled
    teacher: float | None
    n: int

    @property
    def sign(self) -> int:
        """1 where less of the ranked value is better."""
        return -1 if self.about.better == "higher" else 1


class MetricTables:
    """Rows of every evaluated run of a comparison, read once."""

    def __init__(self, comparison: Comparison) -> None:
        self.notes: list[str] = []
        self._rows: dict[str, dict[str, list[ScoredRow]]] = {}
        self._arrays: dict[tuple[str, str], Table] = {}
        self._members = {member.place: member for member in comparison.members if member.state == "done"}
        self._arm = {member.place: arm for arm in comparison.arms for member in arm.members}
        self._apart: dict[tuple[str, str], list[str]] = {}
        for place, member in self._members.items():
            for table, rows in self._read(member).items():
                self._rows.setdefault(table, {})[place] = rows
        self._kept = {table: self._comparable(table) for table in self._rows}
        self._ids = {table: self._shared(table) for table in self._kept}

    @property
    def apart(self) -> list[ExcludedRun]:
        return [ExcludedRun(place=place, tables=tuple(tables), why=why) for (place, why), tables in self._apart.items()]

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Metric to its column, in the order in which metrics are listed; the teacher's own values are none."""
        found = {column.name: column for table in self._kept for column in self._columns(table)}
        order = {name: n for n, name in enumerate(known_metrics())}
        return dict(sorted(found.items(), key=lambda item: (order[item[0].partition("@")[0]], item[0])))

    def _read(self, member: ComparedRun) -> dict[str, list[ScoredRow]]:
        assert member.run is not None
        named = value_at(member.run.scores, "rows.after")
        found, described = {}, known_metrics()
        for table, name in (named if isinstance(named, Mapping) else {}).items():
            path = member.run.directory / str(name)
            if ".." in PurePosixPath(str(name)).parts or not path.is_file():
                self.notes.append(f"{member.place}: {name} is missing, so {table} is not compared")
                continue
            try:
                rows = [_known(row, described) for row in read_rows(path)]
                self._arrays[table, member.place] = Table.of(rows)
            except (LimbeckError, UnicodeDecodeError, TypeError) as error:
                self.notes.append(f"{member.place}: {table} is not compared: {error}")
                continue
            found[table] = rows
        return found

    def _comparable(self, table: str) -> list[str]:
        """The runs that most others are comparable with; the rest is set apart."""
        rows = self._rows[table]
        settings = {place: settings_of(self._members[place], table) for place in rows}
        kinds = {place: (self._examples(table, place), tuple(settings[place].items())) for place in rows}
        ((usual, _),) = Counter(kinds.values()).most_common(1)
        # Of those that are alike the one with the most rows.
        model = max((place for place in rows if kinds[place] == usual), key=lambda place: len(rows[place]))
        kept = []
        for place in rows:
            why = difference(rows[place], rows[model], settings[place], settings[model], table)
            if why:
                self._apart.setdefault((place, why), []).append(table)
            else:
                kept.append(place)
        return kept

    def _examples(self, table: str, place: str) -> frozenset[str]:
        """What tells the examples of a run from those of others; nothing where each may lack some."""
        return frozenset() if rows_may_lack(table) else frozenset(row.id for row in self._rows[table][place])

    def _shared(self, table: str) -> list[str]:
        """The examples that all runs of a table have, in the order of the first."""
        first, *others = (self._rows[table][place] for place in self._kept[table])
        every = [{row.id for row in rows} for rows in others]
        ids = [row.id for row in first if all(row.id in known for known in every)]
        if (most := max(len(first), *map(len, every), 0)) > len(ids):
            self.notes.append(f"{table} is compared on {len(ids)} of {most} examples: those that all runs have")
        return ids

    def _columns(self, table: str) -> list[Column]:
        import numpy as np

        places, rows = self._kept[table], self._rows[table]
        if not (ids := self._ids[table]):
            return []
        counts_BE = draws(len(ids), RESAMPLES, f"{len(ids)} examples")
        measured: dict[str, dict[str, tuple[float, ndarray]]] = {}
        for place in places:
            arrays = self._arrays[table, place]
            if [row.id for row in rows[place]] != ids:
                by_id = {row.id: row for row in rows[place]}
                arrays = Table.of([by_id[one] for one in ids])
            value_M, drawn_BM = arrays.over(np.ones((1, len(ids))))[0], arrays.over(counts_BE)
            for m, name in enumerate(arrays.names):
                value, drawn_B = float(value_M[m]), drawn_BM[:, m]
                # A ratio has no value where what it is divided by is 0.
                if np.isfinite(value):
                    drawn_B = np.where(np.isfinite(drawn_B), drawn_B, value)
                    measured.setdefault(name, {})[place] = (value, drawn_B)
        _, at, condition = table.partition("@")
        made = []
        for bare, by_place in measured.items():
            about = describe_metric(f"{bare}{at}{condition}")
            target = _target(about, measured)
            if about.better == "match" and (
                target is None or (isinstance(target, Mapping) and set(target) < set(by_place))
            ):
                self.notes.append(
                    f"{about.label} is not compared: the teacher's own value, which it should match, is missing"
                )
            elif about.better != "context":
                made.append(self._column(f"{bare}{at}{condition}", about, by_place, target, len(ids)))
        return made

    def _column(
        self,
        name: str,
        about: Metric,
        measured: Mapping[str, tuple[float, ndarray]],
        target: Mapping[str, tuple[float, ndarray]] | float | None,
        examples: int,
    ) -> Column:
        """Args: measured, target: value and resampled values (B,) of each run; the teacher's may be a constant."""
        import numpy as np

        places = tuple(measured)
        arms = tuple({self._arm[place].number: self._arm[place] for place in places}.values())
        value_R = np.array([measured[place][0] for place in places])
        drawn_BR = np.stack([measured[place][1] for place in places], axis=1)
        sheet = ResampledMetric(
            arm_R=tuple(arms.index(self._arm[place]) for place in places),
            seed_R=tuple(self._members[place].seed for place in places),
            value_R=value_R,
            drawn_BR=drawn_BR,
            examples=examples,
            pivotal=name.partition("@")[0] in LIFTED,
            # What came back of a gap is a pure number too, and may be negative.
            share=about.unit in ("", "F1") and bool(drawn_BR.min() >= 0 and drawn_BR.max() <= 1),
        )
        ranked, teacher = sheet, None if isinstance(target, Mapping) else target
        if isinstance(target, Mapping):
            teacher = float(np.mean([target[place][0] for place in places if place in target]))
        if about.better == "match" and target is not None:
            theirs = [target[place] if isinstance(target, Mapping) else (target, target) for place in places]
            ranked = replace(
                sheet,
                value_R=abs(value_R - np.array([value for value, _ in theirs])),
                drawn_BR=abs(drawn_BR - np.stack([np.broadcast_to(d, len(drawn_BR)) for _, d in theirs], axis=1)),
            )
        resampled = Resampled(sheet=sheet)
        return Column(
            name=name, about=about, arms=arms, places=places, resampled=resampled,
            ranked=resampled if ranked is sheet else Resampled(sheet=ranked), teacher=teacher, n=examples,
        )  # fmt: skip


def _target(
    about: Metric, measured: Mapping[str, Mapping[str, tuple[float, ndarray]]]
) -> Mapping[str, tuple[float, ndarray]] | float | None:
    """The teacher's value beside a metric: its own in each run, a constant, or nothing."""
    if about.teacher is None:
        return about.teacher_value
    return measured.get(about.teacher.partition("@")[0])


def _known(row: ScoredRow, described: Mapping[str, Metric]) -> ScoredRow:
    """A row without the metrics of another version of limbeck or of a package that is not installed."""
    return replace(
        row,
        values={name: value for name, value in row.values.items() if name in described},
        sums={name: parts for name, parts in row.sums.items() if name in POOLED},
    )
