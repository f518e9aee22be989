"""A ranking as a chart: the arms below each other, each with the interval of its mean."""

from __future__ import annotations

from collections.abc import Mapping

from limbeck.compare.charts import Curve, Figure, Point, Scale, lay_out, linear
from limbeck.compare.ranking import Ranking
from limbeck.report.curves import Axis


def ranked_chart(ranking: Ranking, tones: Mapping[str, int]) -> Figure:
    """The arms of a ranking that have a colour, the best on top.

    Args:
        tones: arm's name to its colour.
    """
    lines = [line for line in ranking.lines if line.arm.name in tones]
    curves, values = [], []
    for row, line in enumerate(lines):
        found, mark = line.estimate, "best" if row == 0 else "with" if line.best else ""
        point = Point(x=found.mean, y=-row, x_low=found.low, x_high=found.high, mark=mark)
        values += [value for value in (found.low, found.mean, found.high) if value is not None]
        curves.append(Curve(name=line.arm.name, tone=tones[line.arm.name], points=[point], dotted=True))
    return lay_out(
        name=f"ranked-{ranking.name}",
        title=ranking.label,
        unit=", ".join(part for part in (ranking.unit, ranking.rule) if part),
        x_label="mean and its interval",
        curves=curves,
        x=linear(values),
        y=Scale(axis=Axis(low=-len(lines) + 0.5, high=0.5, marks=())),
    )
