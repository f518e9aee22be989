"""Pictures of the search for the learning rate: the loss after a short trial at each rate, and the rate chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from limbeck.report.charts import HEIGHT, WIDTH, Chart, Mark
from limbeck.report.curves import axis, path
from limbeck.report.format import figure
from limbeck.report.read_run import Run, number

GROUP = "Search for the learning rate"
# A trial that ruined the student would press all others onto one line: the axis ends here, in losses at the start.
MAX_TRIALS = 1.5


def search_charts(run: Run) -> list[Chart]:
    """A chart for each training whose rate was searched."""
    return [chart for name, found in run.searches.items() if (chart := _chart(name, found)) is not None]


def _chart(name: str, found: Mapping[str, Any]) -> Chart | None:
    before, chosen, trials = number(found, "before"), number(found, "chosen"), found.get("trials")
    if before is None or chosen is None or chosen <= 0 or not isinstance(trials, list):
        return None
    top = MAX_TRIALS * before if before > 0 else before + 1.0
    tried = [(rate, _within(number(t, "loss"), top)) for t in trials if (rate := _rate(t)) is not None]
    if len(tried) < 2:
        return None
    tried.sort()
    rates = [math.log10(rate) for rate, _ in tried] + [math.log10(chosen)]
    low, high = min(rates) - 0.1, max(rates) + 0.1
    up = axis([before, *(loss for _, loss in tried)])

    def place(rate: float, loss: float) -> tuple[float, float]:
        return (math.log10(rate) - low) / (high - low), 1 - up.at(loss)

    places = [place(*trial) for trial in tried]
    return Chart(
        name=f"search-{name}",
        title=f"Trials of {name}",
        unit=f"{found.get('metric')}, per token, after a trial; {figure(before)} before",
        x_label="learning rate",
        x_marks=tuple(Mark(at=100 * x, label=f"{rate:.1e}") for (x, _), (rate, _) in zip(places, tried, strict=True)),
        y_marks=tuple(Mark(at=100 * (1 - up.at(mark)), label=f"{mark:g}") for mark in up.marks),
        raw=path([(WIDTH * x, HEIGHT * y) for x, y in places]),
        smoothed="",
        points=tuple(
            (round(100 * x, 2), round(100 * y, 2), (f"{figure(loss)} at {rate:.2g}",))
            for (x, y), (rate, loss) in zip(places, tried, strict=True)
        ),
        last=f"{chosen:.2g} chosen",
        alarms=(Mark(at=100 * place(chosen, before)[0], label=f"{chosen:.2g} chosen"),),
        group=GROUP,
    )


def _rate(trial: Any) -> float | None:
    rate = number(trial, "learning_rate") if isinstance(trial, Mapping) else None
    return rate if rate is not None and rate > 0 else None


def _within(loss: float | None, top: float) -> float:
    return top if loss is None else min(loss, top)
