"""Ranking of arms by a metric, with sentences on what the numbers do and do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from limbeck.compare.pairwise import ComparedPair, letters
from limbeck.compare.runs import ComparedArm
from limbeck.compare.tables import Column
from limbeck.compare.uncertainty import Estimate
from limbeck.report.format import figure, setting
from limbeck.types import LimbeckError

# The metrics that a page shows beside each other, the first of them in the lead; those that were measured are taken.
MAIN = (
    *("forward_kl", "rouge_l_references", "rouge_l", "sample_rouge_l", "win_rate", "win_rate_references"),
    *("accuracy", "pass_at_k", "distinct_2", "self_bleu", "acceptance", "top1_agreement"),
    *("reverse_kl", "student_nll", "student_entropy"),
)
MOST_MAIN = 6
# Beyond so many arms letters are no longer read; which arms are with the best is still marked.
MOST_LETTERED = 20
FEW = 3


@dataclass(frozen=True, kw_only=True)
class RankedArm:
    """One arm in a ranking.

    Attributes:
        mean, interval: of the metric itself, as text; interval is empty where there is none.
        estimate: the same as numbers.
        letters: two arms share one exactly when they are not separated; empty with very many arms.
        best: whether it is not separated from the leader.
        behind, behind_interval: how far it lies behind the leader; empty for the leader.
        track: places of low, mean and high in percent of the row's track.
    """

    arm: ComparedArm
    place: int
    mean: str
    interval: str
    estimate: Estimate
    letters: str
    best: bool
    behind: str
    behind_interval: str
    track: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All arms by one metric, from the best on.

    Attributes:
        winner: whether the leader is separated from every other arm.
        caution: what limits the verdict, or empty.
        ends: labels of the track's two ends.
        teacher_at: place of the teacher's value on the track in percent, where it lies on it.
    """

    name: str
    label: str
    unit: str
    rule: str
    lines: tuple[RankedArm, ...]
    winner: bool
    verdict: str
    caution: str
    ends: tuple[str, str]
    teacher: str
    teacher_at: float | None
    n: int

    def line(self, arm: ComparedArm) -> RankedArm | None:
        """The line of an arm; None where it was not measured, or not as the others were."""
        return next((line for line in self.lines if line.arm is arm), None)


def main_columns(columns: Mapping[str, Column], metric: str | None) -> list[Column]:
    """The columns of the page's table, the leading one first.

    Raises:
        LimbeckError: `metric` was not measured.
    """
    if metric is not None and metric not in columns:
        known = ", ".join(columns) or "nothing, since no run has scores"
        raise LimbeckError(f"--metric is {metric!r}; expected one that was measured: {known}")
    wanted = [column for bare in MAIN for name, column in columns.items() if name.partition("@")[0] == bare]
    # Of a metric under several conditions the first stands for all; the others are in the table of everything.
    firsts: dict[str, Column] = {}
    for column in [*wanted, *columns.values()]:
        firsts.setdefault(column.name.partition("@")[0], column)
    found = list(firsts.values())
    if metric is not None:
        found = [columns[metric], *(column for column in found if column.name != metric)]
    return found[:MOST_MAIN]


def rank(column: Column) -> Ranking:
    """Arms by a metric: less first where less is better, or where the distance from the teacher's value counts."""
    ranked = column.ranked
    order = sorted(range(len(column.arms)), key=lambda n: column.sign * ranked.mean(n))
    pairs = ranked.pairs
    marks = letters(order, pairs) if len(order) <= MOST_LETTERED else {}
    estimates = [column.resampled.estimate(n) for n in range(len(column.arms))]
    low, high = _span(estimates, column.teacher if column.about.better == "match" else None)

    def at(value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value - low) / ((high - low) or 1.0))), 2)

    lines, leader = [], order[0]
    for place, n in enumerate(order, start=1):
        found = estimates[n]
        apart = _pair(pairs, leader, n)
        lines.append(
            RankedArm(
                arm=column.arms[n],
                place=place,
                mean=figure(found.mean),
                interval=interval(found.low, found.high),
                estimate=found,
                letters=marks.get(n, ""),
                best=n == leader or apart is None or not apart.separated,
                behind="" if apart is None else figure(abs(apart.difference)),
                behind_interval="" if apart is None else _around(apart),
                track=(
                    at(found.mean if found.low is None else found.low),
                    at(found.mean),
                    at(found.mean if found.high is None else found.high),
                ),
            )
        )
    winner = len(lines) > 1 and not any(line.best for line in lines[1:]) and not ranked.alone
    teacher = column.teacher
    return Ranking(
        name=column.name,
        label=column.about.label,
        unit=column.about.unit,
        rule=_rule(column),
        lines=tuple(lines),
        winner=winner,
        verdict=_verdict(column, lines, winner),
        caution=_caution(column, lines),
        ends=(figure(low), figure(high)),
        teacher="" if teacher is None else figure(teacher) if column.about.teacher else setting(teacher),
        teacher_at=at(teacher) if teacher is not None and low <= teacher <= high else None,
        n=column.n,
    )


def interval(low: float | None, high: float | None) -> str:
    """An interval in words, as the run's own report writes it."""
    return "" if low is None or high is None else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else ''}{figure(abs(value))}".replace("-", "\N{MINUS SIGN}")


def _span(estimates: list[Estimate], teacher: float | None) -> tuple[float, float]:
    values = [v for e in estimates for v in (e.low, e.mean, e.high) if v is not None]
    values += [teacher] if teacher is not None else []
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    return low, high


def _pair(pairs: Mapping[tuple[int, int], ComparedPair], one: int, other: int) -> ComparedPair | None:
    return pairs.get((min(one, other), max(one, other)))


def _around(pair: ComparedPair) -> str:
    size = abs(pair.difference)
    return interval(size - pair.half_width, size + pair.half_width)


def _rule(column: Column) -> str:
    if column.about.better == "match":
        return "the nearer to the teacher's value the better"
    return "higher is better" if column.about.better == "higher" else "lower is better"


def _verdict(column: Column, lines: list[RankedArm], winner: bool) -> str:
    label = column.about.label
    if len(lines) < 2:
        return f"Only {lines[0].arm.name} was measured by {label}"
    if column.ranked.alone:
        return f"{lines[0].arm.name} leads by {label}, on one example: nothing can be said about its spread"
    unit = f" {column.about.unit}" if column.about.unit else ""
    if winner:
        second = lines[1]
        return (
            f"{lines[0].arm.name} is the best of {len(lines)} by {label}: {lines[0].mean}{unit}, and the second, "
            f"{second.arm.name}, is {second.behind} behind ({second.behind_interval})"
        )
    tied = [line.arm.name for line in lines if line.best]
    if len(tied) == len(lines):
        return (
            f"No arm is separated from the best by {label}: {lines[0].arm.name}, with a mean of {lines[0].mean}{unit}"
        )
    shown = ", ".join(tied[1:4]) + (f" and {len(tied) - 4} more" if len(tied) > 4 else "")
    return f"{lines[0].arm.name} leads by {label} with {lines[0].mean}{unit}, but is not separated from {shown}"


def _caution(column: Column, lines: list[RankedArm]) -> str:
    seeds = [line.estimate.seeds for line in lines]
    if max(seeds) == 1:
        return (
            "Every arm has one seed: what is said holds for these runs on prompts like these, and nothing is known of "
            "how far another seed would lie"
        )
    few = [line.arm.name for line in lines if line.estimate.seeds < FEW]
    if not few:
        return ""
    named = ", ".join(few[:4]) + (f" and {len(few) - 4} more" if len(few) > 4 else "")
    alone = "; the interval of an arm with one seed knows nothing of training" if min(seeds) == 1 else ""
    return f"Fewer than {FEW} seeds: {named}. How far seeds lie apart is then little known{alone}"
