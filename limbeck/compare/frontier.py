"""Fidelity beside diversity: one point per arm and decoding temperature, and which points nothing beats in both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from limbeck.compare.charts import GREY, Curve, Figure, Point, lay_out, linear
from limbeck.compare.labels import short_value
from limbeck.compare.ranking import interval
from limbeck.compare.runs import ComparedArm
from limbeck.compare.tables import Column
from limbeck.evaluation.scores.metrics import Metric
from limbeck.report.format import figure, setting

# The first of each that was measured is taken; "@" stands for one value a decoding temperature.
FIDELITY_METRICS = ("sample_rouge_l@", "rouge_l_references", "rouge_l", "acceptance", "forward_kl")
DIVERSITY = ("distinct_2@", "distinct_1@", "self_bleu@")
_LESS_IS_DIVERSE = ("self_bleu",)
_MOST_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class _Spot:
    """A point with its arm; `good` are both values with more as better."""

    arm: ComparedArm
    temperature: float
    point: Point
    good: tuple[float, float]


def frontier(columns: Mapping[str, Column], tones: Mapping[str, int]) -> Figure | None:
    """The chart, or None where fidelity or diversity was not measured.

    Args:
        tones: arm's name to its colour.
    """
    across, up = (_columns(columns, names) for names in (FIDELITY_METRICS, DIVERSITY))
    if not across or not up:
        return None
    spots = _spots(across, up)
    if not spots:
        return None
    best = _front(spots)
    x_about, y_about = next(iter(across.values())).about, next(iter(up.values())).about
    curves = []
    for name in dict.fromkeys(spot.arm.name for spot in spots):
        own = [spot for spot in spots if spot.arm.name == name]
        points = [
            replace(
                spot.point,
                mark="front" if spot in best else "",
                text=f"{short_value(spot.arm.name)} T={setting(spot.temperature)}"
                if spot in best[:_MOST_NAMED]
                else "",
            )
            for spot in own
        ]
        curves.append(Curve(name=name, tone=tones.get(name, GREY), points=points, dotted=True))
    curves += _teacher(across, up)
    x_values = [v for c in curves for p in c.points for v in (p.x_low, p.x, p.x_high) if v is not None]
    y_values = [v for c in curves for p in c.points for v in (p.low, p.y, p.high) if v is not None]
    return lay_out(
        name="frontier",
        title=f"{_bare(y_about.label)} by {_bare(x_about.label)}",
        unit="",
        x_label=_axis(x_about, "lower is better" if x_about.better == "lower" else "higher is better"),
        y_label=_axis(y_about, "lower is more diverse" if _less(up) else "higher is more diverse"),
        curves=curves,
        x=linear(x_values),
        y=linear(y_values),
        remark=_remark(spots, best),
        front=[(spot.point.x, spot.point.y) for spot in best],
        ends=False,
    )


def _columns(columns: Mapping[str, Column], names: Sequence[str]) -> dict[float | None, Column]:
    """Decoding temperature to column, of the first of some metrics that was measured."""
    for name in names:
        bare, at, _ = name.partition("@")
        found: dict[float | None, Column] = {}
        for column in columns.values():
            own, _, condition = column.name.partition("@")
            temperature = re.fullmatch(r"T=([\d.]+)", condition)
            if own == bare and (temperature is not None if at else not condition):
                found[float(temperature[1]) if temperature else None] = column
        if found:
            return dict(sorted(found.items(), key=lambda item: item[0] or 0.0))
    return {}


def _spots(across: Mapping[float | None, Column], up: Mapping[float | None, Column]) -> list[_Spot]:
    spots = []
    for temperature, diversity in up.items():
        fidelity = across.get(temperature, across.get(None))
        if fidelity is None or temperature is None:
            continue
        for n, arm in enumerate(diversity.arms):
            if arm not in fidelity.arms:
                continue
            x, y = fidelity.resampled.estimate(fidelity.arms.index(arm)), diversity.resampled.estimate(n)
            title = (
                f"{arm.name}, decoded at temperature {setting(temperature)}: "
                f"{_bare(fidelity.about.label)} {figure(x.mean)} ({interval(x.low, x.high)}), "
                f"{_bare(diversity.about.label)} {figure(y.mean)} ({interval(y.low, y.high)})"
            )
            point = Point(x=x.mean, y=y.mean, low=y.low, high=y.high, x_low=x.low, x_high=x.high, title=title)
            good = (-fidelity.sign * x.mean, (-1 if _less(up) else 1) * y.mean)
            spots.append(_Spot(arm=arm, temperature=temperature, point=point, good=good))
    return spots


def _front(spots: Sequence[_Spot]) -> list[_Spot]:
    """The Pareto front: spots that no other beats in one of the two without losing in the other, by fidelity."""
    ordered = sorted(spots, key=lambda spot: (-spot.good[0], -spot.good[1]))
    kept: list[_Spot] = []
    for spot in ordered:
        if not kept or spot.good[1] > kept[-1].good[1]:
            kept.append(spot)
    return kept


def _teacher(across: Mapping[float | None, Column], up: Mapping[float | None, Column]) -> list[Curve]:
    """The teacher's own points, where its fidelity and diversity are known."""
    points = []
    for temperature, diversity in up.items():
        fidelity = across.get(temperature, across.get(None))
        if fidelity is not None and fidelity.teacher is not None and diversity.teacher is not None:
            title = f"the teacher at temperature {setting(temperature)}"
            text = f"teacher T={setting(temperature)}"
            points.append(Point(x=fidelity.teacher, y=diversity.teacher, title=title, mark="teacher", text=text))
    return [Curve(name="the teacher", tone=GREY, points=points, dotted=True)] if points else []


def _less(up: Mapping[float | None, Column]) -> bool:
    return next(iter(up.values())).name.partition("@")[0] in _LESS_IS_DIVERSE


def _bare(label: str) -> str:
    return re.sub(r" \(T=[\d.]+\)", "", label)


def _axis(about: Metric, sense: str) -> str:
    return f"{_bare(about.label)}{f', {about.unit}' if about.unit else ''} ({sense})"


def _remark(spots: Sequence[_Spot], best: Sequence[_Spot]) -> str:
    named = [f"{spot.arm.name} at T={setting(spot.temperature)}" for spot in best]
    shown = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
    of = "1 point" if len(spots) == 1 else f"{len(spots)} points"
    return f"By their means nothing beats {shown} in both, of {of}. Lines join an arm's decoding temperatures."
