"""The student as its teacher's draft: acceptance by position, domain and temperature, and the number of drafts to take.

The figures are those of the group `speculation`; a breakdown of the acceptance is shown here alone, not among the
metrics of the student.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.report.before_after import ChangeMarker, marker
from limbeck.report.format import count, figure, interval_of
from limbeck.report.read_run import Run, number, score, value_at

ACCEPTANCE = "draft_acceptance"
_NAME = re.compile(rf"{ACCEPTANCE}@draft=(\d{{1,9}})(?:,(position|category|T)=(.+))?")
_WORDS = {"position": "Draft {}", "category": "{}", "T": "Temperature {}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceLine:
    """The acceptance under one condition.

    Attributes:
        label: its condition: all drafts, one of their positions, a domain, a temperature.
        tokens, measured, expected: tokens per pass and speed-ups, empty where the condition is a part of the drafts.
    """

    label: str
    value: str
    interval: str
    dot: ChangeMarker
    examples: str
    tokens: str = ""
    measured: str = ""
    expected: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """The section of the report.

    Attributes:
        lead: sentences: what a draft costs, from where on it pays, how many to take.
        tables: heading to its lines.
        by_number: drafts per pass with the expected speed-up and the break-even acceptance.
    """

    lead: str
    tables: Mapping[str, tuple[AcceptanceLine, ...]]
    by_number: tuple[tuple[str, str, str], ...]


def drafting(run: Run) -> Drafting | None:
    """The section; None where no draft was measured."""
    tables: dict[str, list[AcceptanceLine]] = {}
    for name in value_at(run.scores, "after") or {}:
        found = _NAME.fullmatch(str(name))
        seen = score(run, "after", name) if found else None
        if found is not None and seen is not None:
            kind = found[2] or ""
            heading = {"position": f"By position, {found[1]} drafts per pass", "category": "By domain"}.get(kind, "")
            tables.setdefault(heading, []).append(_line(run, name, found, seen))
    if not tables:
        return None
    # All drafts first, whatever the order of the file.
    ordered = {heading: tuple(tables[heading]) for heading in sorted(tables, key=lambda heading: heading != "")}
    return Drafting(lead=_lead(run), tables=ordered, by_number=tuple(_by_number(run)))


def _line(run: Run, name: str, found: re.Match[str], seen: Mapping[str, Any]) -> AcceptanceLine:
    drafts, kind, what = found.groups()
    of = name.removeprefix(ACCEPTANCE)
    label = f"{drafts} drafts per pass" if kind in (None, "T") else _WORDS[kind].format(what)
    label += f", {_WORDS['T'].format(what).lower()}" if kind == "T" else ""
    more = {key: score(run, "after", f"{metric}{of}") for key, metric in _BESIDE.items()}
    return AcceptanceLine(
        label=label,
        value=figure(seen["mean"]),
        interval=interval_of(seen),
        dot=marker(seen, "after", 1.0),
        examples=count(number(seen, "n")),
        **{key: "" if one is None else figure(one["mean"]) for key, one in more.items()},
    )


_BESIDE = {"tokens": "tokens_per_pass", "measured": "speculative_speedup", "expected": "expected_speedup"}


def _lead(run: Run) -> str:
    cost, best, least = (
        None if (found := score(run, "after", name)) is None else found["mean"]
        for name in ("draft_cost", "best_draft_tokens", "break_even_acceptance")
    )
    said = []
    if cost is not None:
        said.append(f"A draft costs {figure(cost)} of a step of the teacher on this machine")
        pays = (
            "no acceptance would make it pay" if least is None else f"it pays from an acceptance of {figure(least)} on"
        )
        said.append(pays)
    if best is not None:
        said.append(
            f"the best number of drafts per pass is {best:.0f}" if best >= 1 else "no number of drafts pays here"
        )
    return "; ".join(said)


def _by_number(run: Run) -> Iterator[tuple[str, str, str]]:
    """Of the first number of drafts that was measured: its acceptance, carried over to other numbers."""
    for name, found in run.drafting.items():
        table = (
            found.get("by_measured_passes") if isinstance(found, Mapping) and str(name).startswith("draft=") else None
        )
        speedups = table.get("speedup") if isinstance(table, Mapping) else None
        if isinstance(table, Mapping) and isinstance(speedups, Mapping):
            for drafts in list(speedups)[:_MOST_ROWS]:
                least = number(table, f"break_even_acceptance.{drafts}")
                yield str(drafts), figure(number(speedups, drafts)), "none" if least is None else figure(least)
            return


# A page has room for no more.
_MOST_ROWS = 32
