"""From rows to scores: weighted means, bootstrap intervals over examples, and the files that keep both.

Every group of metrics (fidelity, rouge, ...) measures one `ScoredRow` an example; everything after that is the same for
all of them and lives here. A run directory gets `scores.json` (the summary) and `scores/PART.GROUP.jsonl` (the rows).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.evaluation.metrics import METRICS, describe
from limbeck.flow import LimbeckError, Score, ScoredRow, Scores
from limbeck.rundir import write_text

if TYPE_CHECKING:
    from numpy import ndarray

Groups = Mapping[str, Sequence[ScoredRow]]

CONFIDENCE = 0.95
RESAMPLES = 2000


def summarise(rows: Sequence[ScoredRow], *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Score]:
    """Weighted mean of every metric with its percentile bootstrap interval over rows.

    The mean is ``sum_i weight_i value_i / sum_i weight_i``, in float64. A resample draws whole examples, since the
    tokens of one answer are far from independent (Efron and Tibshirani 1993, chapter 13).

    Raises:
        LimbeckError: no rows, rows that measure different things, repeated ids, or values that are not finite.
    """
    weight_R, value_RM, names = _table(rows)
    counts_SR = _resample(len(rows), seed, resamples)
    means_SM = (counts_SR @ (weight_R[:, None] * value_RM)) / (counts_SR @ weight_R)[:, None]
    point_M = (weight_R @ value_RM) / weight_R.sum()
    return _scores(names, point_M, means_SM, len(rows))


def paired_change(
    before: Sequence[ScoredRow], after: Sequence[ScoredRow], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Score]:
    """After minus before, where every resample draws the same examples for both.

    Raises:
        LimbeckError: the two did not measure the same examples and metrics, or `summarise` would refuse one of them.
    """
    by_id = {row.id: row for row in after}
    if [row.id for row in before] != [row.id for row in after]:
        if {row.id for row in before} != set(by_id) or len(by_id) != len(after):
            raise LimbeckError(
                f"before holds {len(before)} examples and after {len(after)}, not all the same ones; "
                "expected one row an example in both: evaluate both students on the same held-out examples"
            )
        after = [by_id[row.id] for row in before]
    weight_R, value_RM, names = _table(before)
    weight_after_R, value_after_RM, names_after = _table(after)
    if names != names_after:
        raise LimbeckError(
            f"before measured {', '.join(names)} and after {', '.join(names_after)}; expected the same metrics: "
            "evaluate both again"
        )
    counts_SR = _resample(len(before), seed, resamples)
    means_SM = (counts_SR @ (weight_after_R[:, None] * value_after_RM)) / (counts_SR @ weight_after_R)[:, None]
    means_SM -= (counts_SR @ (weight_R[:, None] * value_RM)) / (counts_SR @ weight_R)[:, None]
    point_M = (weight_after_R @ value_after_RM) / weight_after_R.sum() - (weight_R @ value_RM) / weight_R.sum()
    return _scores(names, point_M, means_SM, len(before))


def assemble(before: Groups, after: Groups, *, seed: int = 0, resamples: int = RESAMPLES) -> Scores:
    """The scores of all groups of metrics, GROUP or GROUP@CONDITION; one measured on one side only has no change."""
    sides = {}
    for part, groups in (("before", before), ("after", after)):
        sides[part] = {
            _named(name, group): score
            for group, rows in groups.items()
            for name, score in summarise(rows, seed=seed, resamples=resamples).items()
        }
    change = {
        _named(name, group): score
        for group in before
        if group in after
        for name, score in paired_change(before[group], after[group], seed=seed, resamples=resamples).items()
    }
    return Scores(before=sides["before"], after=sides["after"], change=change)


def _named(metric: str, group: str) -> str:
    """A metric's name with the condition its group of rows was measured under."""
    _, at, condition = group.partition("@")
    return f"{metric}{at}{condition}"


def write_rows(path: Path, rows: Sequence[ScoredRow]) -> None:
    """One JSON object a row: id, weight and the metrics side by side. Written whole or not at all."""
    lines = (json.dumps({"id": r.id, "weight": r.weight, **r.values}, allow_nan=False) for r in rows)
    write_text(path, "".join(line + "\n" for line in lines))


def read_rows(path: Path) -> list[ScoredRow]:
    """The rows of `write_rows`, bit for bit.

    Raises:
        LimbeckError: a line is no such row; names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            row = ScoredRow(id=fields.pop("id"), weight=float(fields.pop("weight")), values=fields)
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise LimbeckError(
                f"{path}:{number}: got a line that is no scored row ({error}); expected an object with id, weight and "
                "metrics: delete the file and evaluate again"
            ) from error
        rows.append(row)
    return rows


def write_scores(run_dir: Path, *, before: Groups, after: Groups, seed: int = 0, resamples: int = RESAMPLES) -> Scores:
    """Write the rows of every group and then `scores.json`, which names them, and return the scores.

    Args:
        before, after: rows by group of metrics ("fidelity", "rouge"); either may be empty in a half-finished run.
    """
    scores = assemble(before, after, seed=seed, resamples=resamples)
    files: dict[str, dict[str, str]] = {"before": {}, "after": {}}
    for part, groups in (("before", before), ("after", after)):
        for group, rows in groups.items():
            files[part][group] = f"scores/{part}.{group}.jsonl"
            write_rows(run_dir / files[part][group], rows)
    document = {
        "format": 1,
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "seed": seed,
        "metrics": {name: asdict(describe(name)) for name in _in_order({**scores.before, **scores.after})},
        **{part: {name: asdict(s) for name, s in side.items()} for part, side in _parts(scores).items()},
        "rows": files,
    }
    write_text(run_dir / "scores.json", json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return scores


def _in_order(names: Iterable[str]) -> list[str]:
    """As METRICS has them; a metric's conditions one after another."""
    places = {name: place for place, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: places[name.partition("@")[0]])


def _parts(scores: Scores) -> dict[str, Mapping[str, Score]]:
    return {"before": scores.before, "after": scores.after, "change": scores.change}


def _table(rows: Sequence[ScoredRow]) -> tuple[ndarray, ndarray, list[str]]:
    import numpy as np

    if not rows:
        raise LimbeckError("got no examples to score; expected at least one: raise prompts.eval_fraction")
    names = list(rows[0].values)
    unknown = [name for name in names if name not in METRICS]
    assert not unknown, f"describe {unknown} in METRICS"
    seen = set()
    for row in rows:
        if row.id in seen:
            raise LimbeckError(f"got example {row.id!r} twice; expected one row an example: merge its rows first")
        seen.add(row.id)
        if set(row.values) != set(names):
            raise LimbeckError(
                f"example {row.id!r} measures {', '.join(row.values)}; expected {', '.join(names)} as the first row: "
                "evaluate again"
            )
        for name in names:
            if not math.isfinite(row.values[name]):
                raise LimbeckError(
                    f"{name} of example {row.id!r} is {row.values[name]}; expected a finite number: "
                    "look for NaN or inf in the weights of the student and the teacher"
                )
        if not (math.isfinite(row.weight) and row.weight > 0):
            raise LimbeckError(f"example {row.id!r} has weight {row.weight}; expected more than 0: drop empty examples")
    weight_R = np.array([row.weight for row in rows], dtype=np.float64)
    value_RM = np.array([[row.values[name] for name in names] for row in rows], dtype=np.float64)
    return weight_R, value_RM, names


def _resample(examples: int, seed: int, resamples: int) -> ndarray:
    """How often each example is drawn, (resamples, examples) float64; the same for every metric and both sides."""
    import numpy as np

    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.multinomial(examples, np.full(examples, 1.0 / examples), size=resamples).astype(np.float64)


def _scores(names: Sequence[str], point_M: ndarray, means_SM: ndarray, examples: int) -> dict[str, Score]:
    import numpy as np

    tail = 50 * (1 - CONFIDENCE)
    low_M, high_M = np.percentile(means_SM, [tail, 100 - tail], axis=0)
    alone = examples < 2
    return {
        name: Score(
            mean=float(point_M[m]),
            low=None if alone else float(low_M[m]),
            high=None if alone else float(high_M[m]),
            n=examples,
        )
        for m, name in enumerate(names)
    }
