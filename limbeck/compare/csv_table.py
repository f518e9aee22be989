"""The scores of every run as CSV: one row per run and metric, for other charts."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from limbeck.compare.labels import value_of
from limbeck.compare.runs import Comparison
from limbeck.report.read_run import number, value_at

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def tidy(comparison: Comparison) -> str:
    """Columns: arm, seed, run, tuning, the keys that differ, metric, mean, low, high, n.

    The values are those after training from each run's scores.json; low and high are its interval over examples. What a
    spreadsheet would take for a formula has an apostrophe in front.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    members = [*comparison.members, *comparison.tuning]
    keys = [*comparison.varied]
    keys += [key for member in comparison.tuning for key in member.keys if key not in keys]
    keys = list(dict.fromkeys(keys))
    table.writerow(["arm", "seed", "run", "tuning", *map(_inert, keys), "metric", "mean", "low", "high", "n"])
    for member in members:
        found = value_at(member.run.scores, "after") if member.run else None
        for metric, score in (found if isinstance(found, Mapping) else {}).items():
            if not isinstance(score, Mapping) or number(score, "mean") is None:
                continue
            figures = [number(score, name) for name in ("mean", "low", "high", "n")]
            own = [value_of(member.keys, key) if key in member.keys else "" for key in keys]
            named = (member.arm, member.seed, member.place, "yes" if member.tuning else "no", *own, metric)
            table.writerow(
                [_inert(cell) for cell in named] + ["" if value is None else f"{value:.10g}" for value in figures]
            )
    return text.getvalue()


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return f"'{value}" if formula and not _NUMBER.fullmatch(value) else value
