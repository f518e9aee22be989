"""A metric over a swept setting, the objective's temperature above all: one line for each of the other keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limbeck.compare.charts import COLOR_COUNT, GREY, Curve, Figure, Point, lay_out, linear, settings_scale
from limbeck.compare.labels import differing
from limbeck.compare.pairwise import ComparedPair
from limbeck.compare.ranking import interval
from limbeck.compare.runs import ComparedArm, Comparison
from limbeck.compare.tables import Column
from limbeck.report.format import figure, setting

# The settings whose curves are drawn, and the metrics over each.
MOST_KEYS, MOST_METRICS = 3, 3
FIRST = "objective.temperature"
_MOST_TIED = 5


@dataclass(frozen=True, kw_only=True)
class Panel:
    """All charts of one swept setting."""

    key: str
    plates: tuple[Figure, ...]


def panels(comparison: Comparison, columns: Sequence[Column]) -> list[Panel]:
    """Charts of the settings of which arms have at least two numbers."""
    chosen = tuned_keys(comparison)
    keys = [key for key in comparison.varied if key not in chosen and len(_numbers(comparison.arms, key)) > 1]
    keys.sort(key=lambda key: key != FIRST)
    made = []
    for key in keys[:MOST_KEYS]:
        plates = [plate for column in columns[:MOST_METRICS] if (plate := _plate(column, key))]
        if plates:
            made.append(Panel(key=key, plates=tuple(plates)))
    return made


def tuned_keys(comparison: Comparison) -> set[str]:
    """The settings that were chosen for each arm by runs of their own: no axis of the comparison."""
    by_arm: dict[str, list[Mapping[str, object]]] = {}
    for member in comparison.tuning:
        by_arm.setdefault(member.arm, []).append(member.keys)
    return {key for keys in by_arm.values() for key in differing(keys)}


def _number(arm: ComparedArm, key: str) -> float | None:
    value = arm.keys.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(arms: Sequence[ComparedArm], key: str) -> set[float]:
    return {value for arm in arms if (value := _number(arm, key)) is not None}


def _plate(column: Column, key: str) -> Figure | None:
    """One metric over one setting; None where fewer than two of its values were measured."""
    if len(_numbers(column.arms, key)) < 2:
        return None
    lines: dict[str, list[tuple[float, int]]] = {}
    for n, arm in enumerate(column.arms):
        value = _number(arm, key)
        if value is not None:
            lines.setdefault(_without(arm.name, key) or "all", []).append((value, n))
    pairs = column.ranked.pairs
    tones = {name: turn if turn < COLOR_COUNT else GREY for turn, name in enumerate(lines)}
    curves = [_curve(name, sorted(own), column, pairs, tones[name]) for name, own in lines.items()]
    values = [v for curve in curves for p in curve.points for v in (p.low, p.y, p.high) if v is not None]
    values += [v for curve in curves for _, low, high in curve.band for v in (low, high)]
    rule = {"lower": "lower is better", "higher": "higher is better"}.get(column.about.better, "")
    if column.teacher is not None and column.about.better == "match":
        rule = f"best at the teacher's {figure(column.teacher)}"
    return lay_out(
        name=f"{key}-{column.name}",
        title=column.about.label,
        unit=", ".join(part for part in (column.about.unit, rule) if part),
        x_label=key,
        curves=curves,
        x=settings_scale([value for own in lines.values() for value, _ in own]),
        y=linear(values),
        remark=_remark(curves),
    )


def _without(name: str, key: str) -> str:
    """An arm's name without one setting; arms that share it are one line over that setting."""
    said = (f"{key}=", f"{key.rpartition('.')[2]}=")
    return ", ".join(part for part in name.split(", ") if not part.startswith(said))


def _curve(
    name: str,
    own: Sequence[tuple[float, int]],
    column: Column,
    pairs: Mapping[tuple[int, int], ComparedPair],
    tone: int,
) -> Curve:
    leader = min((n for _, n in own), key=lambda n: column.sign * column.ranked.mean(n))
    sheet, points, band = column.resampled.sheet, [], []
    for value, n in own:
        found = column.resampled.estimate(n)
        pair = pairs.get((min(leader, n), max(leader, n)))
        mark = "best" if n == leader else "with" if pair is None or not pair.separated else ""
        seeds = [float(sheet.value_R[run]) for run in sheet.runs[n].values()]
        band.append((value, min(seeds), max(seeds)))
        span = interval(found.low, found.high)
        title = f"{name} at {setting(value)}: {figure(found.mean)}{f' ({span})' if span else ''}, {_seeds(len(seeds))}"
        points.append(Point(x=value, y=found.mean, low=found.low, high=found.high, title=title, mark=mark))
    return Curve(name=name, tone=tone, points=points, band=band, dotted=True)


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _remark(curves: Sequence[Curve]) -> str:
    """For each line where it is best, and what it is not separated from there."""
    parts = []
    for curve in curves[:6]:
        if len(curve.points) < 2:
            continue
        best = next(point.x for point in curve.points if point.mark == "best")
        tied = [setting(point.x) for point in curve.points if point.mark == "with"]
        shown = ", ".join(tied[:_MOST_TIED]) + (f" and {len(tied) - _MOST_TIED} more" if len(tied) > _MOST_TIED else "")
        tail = f", not separated from {shown}" if tied else ", separated from all others"
        parts.append(f"{curve.name}: best at {setting(best)}{tail}")
    return "; ".join(parts) + ("; …" if len(curves) > 6 else "")
