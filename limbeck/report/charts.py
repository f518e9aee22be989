"""The training curves of the report, ready for the template: axis marks in percent, paths, values to hover over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.report.curves import Axis, axis, path, smooth, thin, tight_axis
from limbeck.report.format import count, figure, objective_text, setting
from limbeck.report.on_policy import names_in
from limbeck.report.read_run import Run, number
from limbeck.rollouts.alarms import EVERY_ALARM

# The drawing area in its own units; the page stretches it to the width there is, lines keep their thickness.
WIDTH, HEIGHT = 1000, 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A label on an axis, `at` percent from its beginning."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One curve.

    Attributes:
        raw: SVG path of the logged values.
        smoothed: path of their running mean, empty for short curves.
        points: per point its place in percent (x, y) and the lines of its label.
        last: the final value in words.
        alarms: places where an alarm went off that reads this metric.
        group: heading of the curves that it belongs to; empty for those that every training has.
    """

    name: str
    title: str
    unit: str
    x_label: str
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    raw: str
    smoothed: str
    points: tuple[tuple[float, float, tuple[str, ...]], ...]
    last: str
    alarms: tuple[Mark, ...]
    group: str


OWN, MIX, PREFERENCE = "The student's own responses", "Mixture and objective", "Preference tuning"
CURVES = (
    ("loss", "Loss", "", False, True),
    ("forward_kl", "Forward KL", "at temperature 1", True, True),
    ("eval_loss", "Loss", "on set-aside prompts", False, False),
    ("eval_forward_kl", "Forward KL", "on set-aside prompts", False, False),
    ("loss/lm", "Loss", "on the text of train.lm", False, True),
    ("acceptance", "Acceptance", "shared probability", True, True),
    ("top1_agreement", "Agreement", "same top token", True, True),
    ("student_entropy", "Student's entropy", "at the loss temperature", True, True),
    ("temperature", "Temperature", "of the loss", True, False),
    ("learning_rate", "Learning rate", "", True, False),
    ("grad_norm", "Gradient norm", "before clipping", True, True),
    ("tokens_per_s", "Speed", "tokens/s", True, True),
    ("responses/truncated", "Cut off", "share of responses", True, True),
    ("responses/repeated", "Looping", "share of responses", True, True),
    ("responses/empty", "Empty", "share of responses", True, True),
    ("responses/length", "Length", "tokens per response", True, True),
    ("log_q/student", "Log q", "nats/token of its own", False, True),
    ("engine/gap", "Engine's numbers", "nats/token from the student's here", True, False),
    ("kl_p99", "99th percentile", "of the divergence", True, True),
    ("share", "Share", "by the student", True, False),
    ("heldout_loss", "Held-out loss", "nats/token", False, False),
    ("alpha/teacher", "Alpha", "teacher's responses", True, True),
    ("alpha/student", "Alpha", "student's responses", True, True),
    ("beta", "Beta", "weight of its responses", True, False),
)
# Of the preference tuning, which has steps of its own.
PREFERENCE_CURVES = (
    ("rewards/margins", "Reward margin", "chosen less rejected", True, True),
    ("rewards/accuracies", "Reward accuracy", "share of pairs", True, True),
    ("rewards/chosen", "Reward", "of chosen answers", False, True),
    ("rewards/rejected", "Reward", "of rejected answers", False, True),
)
MIXED = ("share", "heldout_loss", "alpha/teacher", "alpha/student", "beta")
CHART_GROUPS = {"log_q/student": OWN, "kl_p99": OWN, "engine/gap": OWN} | dict.fromkeys(MIXED, MIX)
CHART_GROUPS |= {key: PREFERENCE for key, *_ in PREFERENCE_CURVES}


def charts(run: Run) -> list[Chart]:
    """The curves for which the run logged at least two values, without those that only repeat the loss."""
    made = []
    for key, title, unit, zero, wavering in CURVES:
        rows = [row for row in run.steps if number(row, key) is not None]
        again = key != "loss" and all(math.isclose(row[key], number(row, "loss") or 0.0, rel_tol=1e-3) for row in rows)
        if len(rows) > 1 and not again:
            made.append(_chart(key, title, _loss_unit(run) if key == "loss" else unit, rows, zero, wavering))
    for key, title, unit, zero, wavering in PREFERENCE_CURVES:
        rows = [row for row in run.rewards if number(row, key) is not None]
        if len(rows) > 1:
            made.append(_chart(key, title, unit, rows, zero, wavering))
    return made


def _loss_unit(run: Run) -> str:
    # Not nats: that depends on the objective, and the temperature's factor is in the value.
    return ", ".join(["per token", *objective_text(run)])


def _chart(key: str, title: str, unit: str, rows: Sequence[Mapping[str, Any]], zero: bool, wavering: bool) -> Chart:
    steps, values = [float(row["step"]) for row in rows], [float(row[key]) for row in rows]
    means = smooth(values, max(3, len(values) // 15)) if wavering and len(values) >= 20 else []
    across, up = tight_axis(steps), axis(values, marks=5, zero=zero)
    place = [(across.at(step), 1 - up.at(value)) for step, value in zip(steps, values, strict=True)]
    kept = thin(values)
    points = []
    for n in kept:
        mean = f"{figure(means[n])} smoothed" if means else ""
        points.append((*(round(100 * at, 2) for at in place[n]), _label(rows[n], key, unit, mean)))
    return Chart(
        name=key,
        title=title,
        unit=unit,
        x_label="step",
        x_marks=tuple(Mark(at=100 * across.at(mark), label=f"{mark:,.0f}") for mark in across.marks),
        y_marks=tuple(Mark(at=100 * (1 - up.at(mark)), label=_mark(mark)) for mark in up.marks),
        raw=path([(WIDTH * place[n][0], HEIGHT * place[n][1]) for n in kept]),
        smoothed=path(_scaled(steps, means, across.at, up.at)) if means else "",
        points=tuple(points),
        last=figure(means[-1] if means else values[-1]),
        alarms=_alarms(rows, key, across),
        group=OWN if key.startswith("responses/") else CHART_GROUPS.get(key, ""),
    )


def _alarms(rows: Sequence[Mapping[str, Any]], key: str, across: Axis) -> tuple[Mark, ...]:
    return tuple(
        Mark(at=100 * across.at(row["step"]), label=name)
        for row in rows
        for name in names_in(row)
        if name in EVERY_ALARM and EVERY_ALARM[name].keys[0] == key
    )


def _scaled(steps, means, across, up) -> list[tuple[float, float]]:
    kept = thin(means)
    return [(WIDTH * across(steps[n]), HEIGHT * (1 - up(means[n]))) for n in kept]


def _mark(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return count(value) if abs(value) >= 1e4 else f"{value:g}"


def _label(row: Mapping[str, Any], key: str, unit: str, mean: str) -> tuple[str, ...]:
    short = unit if key == "tokens_per_s" else "per token" if key == "loss" else ""
    lines = [f"{figure(number(row, key))} {short}".strip()]
    if mean:
        lines.append(mean)
    where = [f"step {row['step']:,.0f}"]
    if number(row, "epoch") is not None:
        where.append(f"epoch {figure(number(row, 'epoch'))}")
    if number(row, "tokens") is not None:
        where.append(f"{count(number(row, 'tokens'))} tokens")
    lines.append(", ".join(where))
    if key == "loss" and row.get("objective"):
        temperature = number(row, "temperature")
        lines.append(
            f"{row['objective']}" + (f", temperature {setting(temperature)}" if temperature is not None else "")
        )
    return tuple(lines)
