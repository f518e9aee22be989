"""Charts of several lines with intervals, ready for the template: everything in percent of the drawing area."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from limbeck.compare.labels import short_value
from limbeck.report.charts import HEIGHT, WIDTH, Mark
from limbeck.report.curves import Axis, axis, path, tight_axis

# As many lines as there are colours that stay apart for everybody; further ones are drawn in grey.
COLOR_COUNT = 8
GREY = -1
# Lines of text need so much of the height of a chart.
_PITCH = 5.5
# And so many percent of its width, where it stands beside a point.
_BESIDE = 25.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured value.

    Attributes:
        low, high: interval of y; x_low, x_high: that of x. None where there is none.
        title: shown when pointed at.
        mark: "best", "with" (not separated from the best of its line), "front" (nothing is better in both), or "".
        text: written beside it.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    title: str = ""
    mark: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points in the order in which a line joins them; `band` are (x, low, high) of a shade behind it."""

    name: str
    tone: int
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    dotted: bool = False
    """Whether the points are drawn, beside the line."""


@dataclass(frozen=True, kw_only=True)
class ScatterPoint:
    x: float
    y: float
    title: str
    mark: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A curve as the template needs it: SVG paths, dots and a label (x and y in percent; None without one)."""

    name: str
    label: str
    tone: int
    line: str
    band: str
    bars: str
    dots: tuple[ScatterPoint, ...]
    label_at: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart with its axes. `front` is an SVG path across the curves, or empty; `ends`: lines end at the right."""

    name: str
    title: str
    unit: str
    x_label: str
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    curves: tuple[Drawn, ...]
    remark: str = ""
    front: str = ""
    y_label: str = ""
    ends: bool = True


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Mapping of numbers to places on an axis: linear, logarithmic, or reversed."""

    axis: Axis
    log: bool = False
    marks: tuple[tuple[float, str], ...] = field(default=())

    def at(self, value: float) -> float:
        """0 at the beginning, 1 at the end."""
        return self.axis.at(math.log(value) if self.log else value)

    def places(self) -> tuple[tuple[float, str], ...]:
        """Place in percent and label of every mark."""
        marks = self.marks or tuple((mark, mark_label(mark)) for mark in self.axis.marks)
        return tuple((100 * self.at(value), text) for value, text in marks)


def linear(values: Sequence[float], *, tight: bool = False, zero: bool = False) -> Scale:
    return Scale(axis=tight_axis(values) if tight else axis(values, zero=zero))


def settings_scale(values: Sequence[float]) -> Scale:
    """For a swept setting: marks at its own values, logarithmic where they span a factor of 8 or more."""
    values = sorted(set(values))
    log = values[0] > 0 and values[-1] / values[0] >= 8
    shown = values if len(values) <= 9 else values[:: math.ceil(len(values) / 9)]
    inner = [math.log(v) if log else v for v in values]
    pad = 0.04 * (inner[-1] - inner[0]) or 0.5
    span = Axis(low=inner[0] - pad, high=inner[-1] + pad, marks=())
    return Scale(axis=span, log=log, marks=tuple((value, f"{value:g}") for value in shown))


def mark_label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:g}"


def lay_out(
    *,
    name: str,
    title: str,
    unit: str,
    x_label: str,
    curves: Sequence[Curve],
    x: Scale,
    y: Scale,
    y_label: str = "",
    remark: str = "",
    front: Sequence[tuple[float, float]] = (),
    ends: bool = True,
) -> Figure:
    """A chart of some curves on two scales; up to TONES of them get a label of their own."""
    drawn = _uncrowded([_drawn(curve, x, y) for curve in curves])
    labelled = [one for one in drawn if one.label_at is not None]
    heights = spread([one.label_at[1] for one in labelled if one.label_at])
    at = {id(one): (one.label_at[0], height) for one, height in zip(labelled, heights, strict=True) if one.label_at}
    return Figure(
        name=name,
        title=title,
        unit=unit,
        x_label=x_label,
        y_label=y_label,
        x_marks=tuple(Mark(at=place, label=text) for place, text in x.places()),
        y_marks=tuple(Mark(at=100 - place, label=text) for place, text in y.places()),
        # Grey ones first, so that they lie behind.
        curves=tuple(
            replace(one, label_at=at.get(id(one)))
            for one in sorted(drawn, key=lambda one: (one.tone != GREY, -one.tone))
        ),
        remark=remark,
        ends=ends,
        front=path([_canvas(x.at(a), y.at(b)) for a, b in front]) if len(front) > 1 else "",
    )


def _uncrowded(drawn: Sequence[Drawn]) -> list[Drawn]:
    """Without the texts beside points that would lie over another one."""
    taken: list[ScatterPoint] = []
    made = []
    for one in drawn:
        dots = []
        for dot in one.dots:
            crowded = any(abs(dot.x - other.x) < _BESIDE and abs(dot.y - other.y) < _PITCH for other in taken)
            dots.append(replace(dot, text="") if crowded else dot)
            taken += [dot] if dot.text and not crowded else []
        made.append(replace(one, dots=tuple(dots)))
    return made


def _drawn(curve: Curve, x: Scale, y: Scale) -> Drawn:
    places = [(x.at(p.x), y.at(p.y)) for p in curve.points]
    bars = []
    for point, (across, up) in zip(curve.points, places, strict=True):
        if point.low is not None and point.high is not None:
            bars.append(path([_canvas(across, y.at(point.low)), _canvas(across, y.at(point.high))]))
        if point.x_low is not None and point.x_high is not None:
            bars.append(path([_canvas(x.at(point.x_low), up), _canvas(x.at(point.x_high), up)]))
    upper = [_canvas(x.at(a), y.at(high)) for a, _, high in curve.band]
    lower = [_canvas(x.at(a), y.at(low)) for a, low, _ in reversed(curve.band)]
    last = places[-1]
    return Drawn(
        name=curve.name,
        label=short_value(curve.name),
        tone=curve.tone,
        line=path([_canvas(*place) for place in places]) if len(places) > 1 else "",
        band=path(upper + lower) + "Z" if len(curve.band) > 1 else "",
        bars="".join(bars),
        dots=tuple(
            ScatterPoint(
                x=round(100 * across, 2),
                y=round(100 - 100 * up, 2),
                title=point.title,
                mark=point.mark,
                text=point.text,
            )
            for point, (across, up) in zip(curve.points, places, strict=True)
        )
        if curve.dotted
        else (),
        label_at=None if curve.tone == GREY else (round(100 * last[0], 2), 100 - 100 * last[1]),
    )


def _canvas(across: float, up: float) -> tuple[float, float]:
    return WIDTH * across, HEIGHT * (1 - up)


def spread(heights: Sequence[float], pitch: float = _PITCH) -> list[float]:
    """Heights moved apart as little as needed, so that neighbours are at least `pitch` from each other."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    blocks: list[tuple[float, list[int]]] = []
    for n in order:
        middle, members = heights[n], [n]
        while blocks and middle - pitch * (len(members) - 1) / 2 < blocks[-1][0] + pitch * (len(blocks[-1][1]) + 1) / 2:
            below, others = blocks.pop()
            middle = (below * len(others) + middle * len(members)) / (len(others) + len(members))
            members = others + members
        blocks.append((middle, members))
    placed = [0.0] * len(heights)
    for middle, members in blocks:
        for turn, n in enumerate(members):
            placed[n] = round(middle + pitch * (turn - (len(members) - 1) / 2), 2)
    return placed
