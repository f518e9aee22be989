"""Learning curves of the arms: the logged metrics of every step, as a mean over seeds with their range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.compare.charts import GREY, Curve, Figure, Point, lay_out, linear
from limbeck.compare.runs import ComparedArm, Comparison
from limbeck.report.curves import smooth
from limbeck.report.read_run import number

# A curve is drawn from means over so many equal stretches of the steps; as many arms as can be followed.
STRETCHES = 80
MAX_CURVES = 40
SHOWN_METRICS = (
    ("forward_kl", "Forward KL while training", "nats/token at temperature 1"),
    ("loss", "Training loss", "per token, of each arm on its own scale"),
)


def learning(comparison: Comparison, tones: Mapping[str, int]) -> list[Figure]:
    """One chart for each metric that at least one arm logged twice."""
    plates = []
    arms = [arm for arm in comparison.arms if arm.name in tones]
    arms += [arm for arm in comparison.arms if arm.name not in tones][: MAX_CURVES - len(arms)]
    for key, title, unit in SHOWN_METRICS:
        curves = [curve for arm in arms if (curve := _curve(arm, key, tones.get(arm.name, GREY)))]
        if not curves:
            continue
        values = [v for c in curves for _, low, high in c.band for v in (low, high)]
        values += [p.y for c in curves for p in c.points]
        plates.append(
            lay_out(
                name=f"learning-{key}",
                title=title,
                unit=unit,
                x_label="step",
                curves=curves,
                x=linear([p.x for c in curves for p in c.points], tight=True),
                y=linear(values),
                remark=_left_out(comparison, arms),
            )
        )
    return plates


def _left_out(comparison: Comparison, arms: Sequence[ComparedArm]) -> str:
    more = len(comparison.arms) - len(arms)
    return f"{more} more arms are not drawn." if more else ""


def _curve(arm: ComparedArm, key: str, tone: int) -> Curve | None:
    """Mean over the arm's runs, and the range of their seeds where there are several."""
    series = [_series(member.run.steps, key) for member in arm.members if member.run is not None]
    series = [one for one in series if len(one) > 1]
    if not series:
        return None
    last = max(step for one in series for step, _ in one)
    first = min(step for one in series for step, _ in one)
    width = max(1.0, (last - first + 1) / STRETCHES)
    means = [_stretched(one, first, width) for one in series]
    points, band = [], []
    for stretch in sorted({s for one in means for s in one}):
        here = [value for one in means if (value := _between(one, stretch)) is not None]
        step = min(last, first + (stretch + 0.5) * width - 0.5)
        points.append(Point(x=step, y=sum(here) / len(here)))
        if len(here) > 1:
            band.append((step, min(here), max(here)))
    return Curve(name=arm.name, tone=tone, points=points, band=band) if len(points) > 1 else None


def _series(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Step and value, smoothed so that lines can be distinguished."""
    rows = [(float(row["step"]), value) for row in steps if (value := number(row, key)) is not None]
    values = [value for _, value in rows]
    if len(values) >= 20:
        values = smooth(values, max(3, len(values) // 15))
    return [(step, value) for (step, _), value in zip(rows, values, strict=True)]


def _stretched(series: Sequence[tuple[float, float]], first: float, width: float) -> dict[int, float]:
    """Number of a stretch of steps to the mean in it."""
    found: dict[int, list[float]] = {}
    for step, value in series:
        found.setdefault(int((step - first) // width), []).append(value)
    return {stretch: sum(values) / len(values) for stretch, values in found.items()}


def _between(means: Mapping[int, float], stretch: int) -> float | None:
    """The mean of a stretch, on a line between its neighbours where nothing was logged in it: a run that was stopped
    logged a step that others did not, and its value alone would be a spike. None before the first and after the last.
    """
    if not min(means) <= stretch <= max(means):
        return None
    before, after = max(one for one in means if one <= stretch), min(one for one in means if one >= stretch)
    share = (stretch - before) / max(after - before, 1)
    return (1 - share) * means[before] + share * means[after]
