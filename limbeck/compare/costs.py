"""Cost of the arms: time by stage, speed, memory, size; and what sharing between the runs of a sweep saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.compare.runs import ComparedArm, ComparedRun, Comparison
from limbeck.report.read_run import STAGE_ORDER, Run, number


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Means over an arm's runs; None where nothing was recorded.

    Attributes:
        stages: stage and seconds, as one run alone would have needed them.
        peak_memory_mib: the highest of any stage and run.
    """

    arm: ComparedArm
    stages: tuple[tuple[str, float], ...]
    seconds: float
    tokens_per_s: float | None
    peak_memory_mib: float | None
    parameters: float | None


@dataclass(frozen=True, kw_only=True)
class CostSummary:
    """All costs, and the seconds that were spent and those that sharing saved."""

    costs: tuple[Cost, ...]
    spent: float
    saved: float


def bill(comparison: Comparison) -> CostSummary:
    """The costs of every arm of which a stage was recorded."""
    costs = [cost for arm in comparison.arms if (cost := _cost(arm))]
    spent = saved = 0.0
    for member in [*comparison.members, *comparison.tuning]:
        for stage in member.run.stages if member.run else ():
            # A stage that was taken over from another run has that run's record, and says so.
            seconds = max(0.0, number(stage, "seconds") or 0.0)
            if stage.get("shared_from"):
                saved += seconds
            else:
                spent += seconds
    return CostSummary(costs=tuple(costs), spent=spent, saved=saved)


def _cost(arm: ComparedArm) -> Cost | None:
    runs = [member.run for member in _counted(arm.members) if member.run is not None]
    runs = [run for run in runs if run.stages]
    if not runs:
        return None
    names = dict.fromkeys(str(stage["stage"]) for run in runs for stage in run.stages)
    order = {name: n for n, name in enumerate(STAGE_ORDER)}
    stages = [(name, _mean([_seconds(run, name) for run in runs]) or 0.0) for name in names if name != "report"]
    stages.sort(key=lambda stage: order.get(stage[0], len(order)))
    peaks = [peak for run in runs for stage in run.stages if (peak := number(stage, "peak_memory_mib")) is not None]
    return Cost(
        arm=arm,
        stages=tuple(stages),
        seconds=sum(seconds for _, seconds in stages),
        tokens_per_s=_mean([_speed(run) for run in runs]),
        peak_memory_mib=max(peaks, default=None),
        parameters=_mean([number(run.student, "parameters") for run in runs]),
    )


def _counted(members: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Finished runs; where there are none, what the others have spent so far."""
    done = [member for member in members if member.state == "done"]
    return done or list(members)


def _seconds(run: Run, name: str) -> float | None:
    seconds = number(run.record(name), "seconds")
    # A clock that was set back meanwhile has measured nothing.
    return None if seconds is None or seconds < 0 else seconds


def _speed(run: Run) -> float | None:
    return number(run.record("train"), "tokens_per_s")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
