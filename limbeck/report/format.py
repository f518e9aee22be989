"""Formatting of numbers, and the opening sentence of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from limbeck.report.read_run import Run, number, score, value_at


def figure(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without exponent where it can be read without."""
    if value is None:
        return "n/a"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def interval_of(found: Mapping[str, Any] | None) -> str:
    """The interval of a score in words; empty where it has none."""
    if found is None or number(found, "low") is None or number(found, "high") is None:
        return ""
    low, high = (figure(found[end]).replace("-", "\N{MINUS SIGN}") for end in ("low", "high"))
    return f"{low} to {high}"


def setting(value: float | None) -> str:
    """A number from a recipe: 2.0 as 2, 0.0003 as 0.0003."""
    return "n/a" if value is None else f"{value:g}"


def count(value: float | None) -> str:
    """1234567 as 1.23M."""
    if value is None:
        return "n/a"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.0f}{letter}" if scaled >= 99.95 else f"{scaled:.3g}{letter}"
    return f"{value:.0f}"


def share(value: float | None) -> str:
    """A share as percent."""
    return "n/a" if value is None else f"{100 * value:.0f} %" if abs(value) >= 0.0995 else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units."""
    if seconds is None or seconds < 0:
        return "n/a"
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(mib: float | None) -> str:
    """MiB, or GiB from one of them on."""
    if mib is None:
        return "n/a"
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.2f} GiB"


def megabytes(size: float | None) -> str:
    """MB, or GB from a thousand on."""
    if size is None:
        return "n/a"
    return f"{size:.0f} MB" if size < 1000 else f"{size / 1000:.2f} GB"


def markdown(value: Any) -> str:
    """Text that Markdown shows as it is, on one line, also inside a cell of a table."""
    text = " ".join(str(value).split())
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return text


def code(value: Any) -> str:
    """Text between the backticks of Markdown, in which nothing has an escape."""
    return " ".join(str(value).split()).replace("`", "'")


def share_of_teacher(student: Mapping[str, Any]) -> float | None:
    """Parameters of the student over those of the teacher."""
    given = number(student, "share")
    own, teacher = number(student, "parameters"), number(student, "teacher_parameters")
    return own / teacher if given is None and own and teacher else given


def objective_text(run: Run) -> list[str]:
    """Name and temperature of the objective, from the last logged step or else the recipe."""
    last = run.steps[-1] if run.steps else {}
    name = last.get("objective") or value_at(run.recipe, "objective.name")
    temperature = number(last, "temperature")
    if temperature is None:
        temperature = number(run.recipe, "objective.temperature")
    return [str(name)] * bool(name) + [f"temperature {setting(temperature)}"] * (temperature is not None)


def name_of(run: Run) -> str:
    """The recipe's name, or that of the directory."""
    return str(value_at(run.recipe, "name") or run.directory.resolve().name)


def headline(run: Run) -> str:
    """The result of the run in one sentence, from its scores; says so where nothing was measured."""
    parts = []
    own, teacher = number(run.student, "parameters"), number(run.student, "teacher_parameters")
    ratio = share_of_teacher(run.student)
    if own and teacher:
        parts.append(f"{count(own)} of {count(teacher)} parameters ({share(ratio)})")
    elif own:
        parts.append(f"{count(own)} parameters")
    for metric, label, unit in (
        ("forward_kl", "forward KL", " nats/token"),
        ("top1_agreement", "top-1 agreement", ""),
        ("rouge_l", "ROUGE-L", ""),
    ):
        if len(parts) < 3:
            parts += _journey(run, metric, label, unit)
    return ", ".join(parts) if parts else "Nothing has been measured yet"


def _journey(run: Run, metric: str, label: str, unit: str) -> list[str]:
    before, after = score(run, "before", metric), score(run, "after", metric)
    if before and after:
        return [f"{label} {before['mean']:.2f}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{after['mean']:.2f}{unit}"]
    if after:
        return [f"{label} {after['mean']:.2f}{unit}"]
    return [f"{label} {before['mean']:.2f}{unit} before training"] if before else []
