"""Decisions between runs: the values that an arm takes, and the arms that go on."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from limbeck.evaluation.scores.metrics import describe_metric
from limbeck.runtime.files import read_json
from limbeck.sweep.arms import Arm, ArmRun, Models, arms_of, final_runs, tuning_run, tuning_runs
from limbeck.sweep.executor import Executor
from limbeck.sweep.ranking import badness, best, beyond, survivors
from limbeck.sweep.settings import Tree
from limbeck.types import LimbeckError

Finals = dict[str, list[ArmRun]]


def tune(executor: Executor, models: Models) -> Finals:
    """The runs of every arm with the values that are best for it; an arm without such values has failed."""
    sweep, finals = executor.sweep, Finals()
    tuning = {arm.name: tuning_runs(sweep, arm, models) for arm in arms_of(sweep)}
    executor.run([run for runs in tuning.values() for run in runs])
    for _ in range(sweep.tune_extend):
        further = {arm.name: _further(executor, arm, tuning[arm.name], models) for arm in arms_of(sweep)}
        if not (new := [run for runs in further.values() for run in runs]):
            break
        executor.table.add(new)
        executor.run(new)
        tuning = {name: runs + further[name] for name, runs in tuning.items()}
    for arm in arms_of(sweep):
        try:
            chosen = _best_values(executor, arm, tuning[arm.name]) if sweep.tune else {}
        except LimbeckError as error:
            executor.fail(final_runs(sweep, arm, {}, models), f"tune: {error}")
            continue
        finals[arm.name] = final_runs(sweep, arm, chosen, models)
        executor.checker.inspect(finals[arm.name])
        executor.table.add(finals[arm.name])
    return finals


def _further(executor: Executor, arm: Arm, tried: list[ArmRun], models: Models) -> list[ArmRun]:
    """A run for each tuned key whose best value is an end of those tried, one step beyond it.

    A value beyond the best that was tried and failed is no end: there the arm diverges. Where what lies beyond cannot
    be (a share above 1), the end is the best.
    """
    try:
        chosen = _winner(executor, tried)
    except LimbeckError:
        return []  # The arm's own failure, which is reported when its values are chosen.
    runs = []
    for key in executor.sweep.tune:
        value = beyond([run.keys[key] for run in tried], chosen[key])
        if value is None:
            continue
        try:
            run = tuning_run(executor.sweep, arm, chosen | {key: value}, models)
            executor.checker.inspect([run])
        except LimbeckError as error:
            executor.console.say(f"{arm.name}: {key} stays at {chosen[key]}, since {value} cannot be ({error})")
            continue
        runs.append(run)
    return runs


def _winner(executor: Executor, tried: list[ArmRun]) -> Tree:
    """The values of the best of the runs that finished."""
    sweep = executor.sweep
    finished = [run for run in tried if executor.table.state(run) == "done"]
    if not finished:
        raise LimbeckError("none of the runs that tune it finished; arms.jsonl says why of each")
    winner = finished[best([badness(sweep.tune_metric, means_after(run)) for run in finished])]
    return {key: winner.keys[key] for key in sweep.tune}


def _best_values(executor: Executor, arm: Arm, tried: list[ArmRun]) -> Tree:
    chosen = _winner(executor, tried)
    said = [f"{arm.name}: the best {key} is {value}" for key, value in chosen.items()]
    for key, value in chosen.items():
        values = list(dict.fromkeys(run.keys[key] for run in tried))
        numbers = all(isinstance(v, int | float) for v in values)
        if len(values) > 1 and numbers and value in (min(values), max(values)):
            said.append(f"an end of {list(values)}: better ones may lie beyond")
    executor.console.say(", ".join(said))
    return chosen


def halve(executor: Executor, finals: Finals) -> Finals:
    """Successive halving: the arms that are left after the last comparison, paused where it was made."""
    halving = executor.sweep.halving
    if halving is None:
        return finals
    for share in halving.at:
        outcomes = executor.run([run for runs in finals.values() for run in runs], pause_at=share)
        standing: dict[str, float] = {}
        for name, runs in finals.items():
            means = [m for run in runs if (m := outcomes[run.directory].means) is not None]
            if len(means) == len(runs):
                standing[name] = fmean(badness(halving.metric, m) for m in means)
            else:
                executor.drop(runs, f"after {share:g} of the steps: not all seeds of the arm came that far")
        going_on = survivors(standing, halving.keep)
        for name in (name for name in standing if name not in going_on):
            shown = _shown(halving.metric, standing[name])
            reason = f"after {share:g} of the steps: {shown}, not among the best {len(going_on)} of {len(standing)}"
            executor.drop(finals[name], reason)
        executor.console.say(f"after {share:g} of the steps {len(going_on)} of {len(finals)} arms go on")
        finals = {name: finals[name] for name in going_on}
    return finals


def _shown(metric: str, badness: float) -> str:
    better = describe_metric(metric).better
    off = " off the teacher's" if better == "match" else ""
    return f"{metric} {-badness if better == 'higher' else badness:.4g}{off}"


def means_after(run: ArmRun) -> Mapping[str, float]:
    """The means of a finished run's scores after training."""
    return {name: score["mean"] for name, score in read_json(run.directory / "scores.json")["after"].items()}
