"""The before/after table: each metric's values with intervals, the direction of its change, and whether that is
significant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.report.format import figure, interval_of, setting
from limbeck.report.read_run import Run, number, score, value_at


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeMarker:
    """A score on the row's track, places in percent; `low` and `high` are None without an interval."""

    at: float
    low: float | None
    high: float | None
    part: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricLine:
    """One metric.

    Attributes:
        verdict: "better", "worse", "unclear" (the interval of the change holds 0), or "" without a change.
        arrow: which way the value moved.
        ends: labels of the track's two ends.
    """

    name: str
    label: str
    unit: str
    meaning: str
    teacher: str
    before: str
    before_interval: str
    after: str
    after_interval: str
    change: str
    change_interval: str
    arrow: str
    verdict: str
    dots: tuple[ChangeMarker, ...]
    teacher_at: float | None
    ends: tuple[str, str]


def evidence(run: Run) -> list[MetricLine]:
    """The lines of the table, in the order of the file; values of the teacher alone are its column, not lines."""
    described = value_at(run.scores, "metrics")
    described = described if isinstance(described, Mapping) else {}
    measured = [name for part in ("before", "after") for name in (value_at(run.scores, part) or {})]
    names = [name for name in described if name in measured]
    names += [name for name in dict.fromkeys(measured) if name not in described]
    lines = []
    for name in names:
        about = described.get(name, {})
        if (
            about.get("better") != "context"
            and not is_breakdown(name)
            and not is_of_stand_in(run, name)
            and (score(run, "before", name) or score(run, "after", name))
        ):
            lines.append(_line(run, name, about, _top(run, names, described, about)))
    return lines


def is_breakdown(name: str) -> bool:
    """Whether a metric is of some of the drafts only, those of one position or domain: they have a section."""
    return re.search(r"@draft=\d+,(position|category)=", name) is not None


def is_of_stand_in(run: Run, name: str) -> bool:
    """Whether a metric is of a model that was measured in the student's place: those have a section."""
    return name.rpartition("@")[2].rpartition(",")[2] in stand_ins(run)


def stand_ins(run: Run) -> dict[str, str]:
    """Models that were measured in the student's place, by name, in words."""
    found = value_at(run.scores, "stand_ins")
    return {name: str(text) for name, text in found.items()} if isinstance(found, Mapping) else {}


def _top(run: Run, names: Sequence[str], described: Mapping[str, Any], about: Mapping[str, Any]) -> float:
    """The end of the track. Shares end at 1; metrics of one unit share an end, so that their tracks can be compared."""
    if about.get("unit", "") in ("", "F1"):
        return 1.0
    ends = []
    for name in names:
        if described.get(name, {}).get("unit") == about["unit"]:
            for part in ("before", "after"):
                found = score(run, part, name)
                if found:
                    ends.append(number(found, "high") or found["mean"])
    return max([*ends, 1e-9]) * 1.04


def _line(run: Run, name: str, about: Mapping[str, Any], top: float) -> MetricLine:
    before, after, change = (score(run, part, name) for part in ("before", "after", "change"))
    teacher = _teacher(run, about)
    moved = change["mean"] if change else 0.0
    return MetricLine(
        name=name,
        label=str(about.get("label", name)),
        unit=str(about.get("unit", "")),
        meaning=str(about.get("meaning", "")),
        teacher=_teacher_in_words(about, teacher),
        before=_mean(before),
        before_interval=interval_of(before),
        after=_mean(after),
        after_interval=interval_of(after),
        change=""
        if change is None
        else f"{'+' if moved >= 0 else '-'}{figure(abs(moved))}".replace("-", "\N{MINUS SIGN}"),
        change_interval=interval_of(change),
        arrow="" if change is None else "▲" if moved > 0 else "▼" if moved < 0 else "=",
        verdict=_verdict(about, before, after, change, teacher),
        dots=tuple(marker(found, part, top) for found, part in ((before, "before"), (after, "after")) if found),
        teacher_at=None if teacher is None else _place(teacher, top),
        ends=("0", figure(top, 2) if top != 1.0 else "1"),
    )


def _teacher(run: Run, about: Mapping[str, Any]) -> float | None:
    if about.get("teacher"):
        found = score(run, "after", about["teacher"]) or score(run, "before", about["teacher"])
        return None if found is None else number(found, "mean")
    return number(about, "teacher_value")


def _teacher_in_words(about: Mapping[str, Any], teacher: float | None) -> str:
    if teacher is None:
        return ""
    return figure(teacher) if about.get("teacher") else setting(teacher)


def _verdict(
    about: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    change: Mapping[str, Any] | None,
    teacher: float | None,
) -> str:
    if not (before and after and change):
        return ""
    low, high = number(change, "low"), number(change, "high")
    if low is None or high is None or low <= 0 <= high:
        return "unclear"
    if about.get("better") == "match":
        if teacher is None:
            return ""
        nearer = abs(after["mean"] - teacher) < abs(before["mean"] - teacher)
        return "better" if nearer else "worse"
    if about.get("better") not in ("lower", "higher"):
        return ""
    return "better" if (change["mean"] > 0) == (about["better"] == "higher") else "worse"


def marker(found: Mapping[str, Any], part: str, top: float) -> ChangeMarker:
    """A score's place on a track that ends at `top`."""
    low, high = number(found, "low"), number(found, "high")
    if low is None or high is None:
        low = high = None
    return ChangeMarker(
        at=_place(found["mean"], top),
        low=None if low is None else _place(low, top),
        high=None if high is None else _place(high, top),
        part=part,
    )


def _place(value: float, top: float) -> float:
    return round(100 * min(1.0, max(0.0, value / top)), 2)


def _mean(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else figure(found["mean"])
