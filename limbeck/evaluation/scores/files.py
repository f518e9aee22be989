"""Scores from rows, and the files of both.

Every group of metrics (fidelity, rouge, ...) measures one `ScoredRow` per example; the rest is the same for all groups
and is in this module. A run directory gets `scores.json` (the summary) and `scores/PART.GROUP.jsonl` (the rows).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limbeck.evaluation.scores.bootstrap import CONFIDENCE, RESAMPLES, paired_change, summarise
from limbeck.evaluation.scores.metrics import STAND_INS, describe_metric, known_metrics, split_stand_in
from limbeck.runtime.files import write_text
from limbeck.runtime.json_lines import json_lines
from limbeck.types import LimbeckError, Score, ScoredRow, Scores

# Of more than this sums of squares would overflow; nothing that is measured comes near.
LARGEST = 1e100
Groups = Mapping[str, Sequence[ScoredRow]]


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
    """Write one JSON object per row: id, weight, the metrics side by side, and `sums`. Written whole or not at all."""
    lines = (
        json.dumps({"id": r.id, "weight": r.weight, **r.values} | ({"sums": r.sums} if r.sums else {}), allow_nan=False)
        for r in rows
    )
    write_text(path, "".join(line + "\n" for line in lines))


def read_rows(path: Path) -> list[ScoredRow]:
    """The rows of `write_rows`, bit for bit.

    Raises:
        LimbeckError: a line is no such row; names file and line.
    """
    rows = []
    for number, line in json_lines(path.read_text("utf-8")):
        try:
            fields = json.loads(line)
            sums = {name: tuple(map(_finite, parts)) for name, parts in fields.pop("sums", {}).items()}
            name, weight = fields.pop("id"), float(_finite(fields.pop("weight")))
            if not isinstance(name, str) or weight < 0:
                raise ValueError("its id is no text, or its weight is negative")
            values = {metric: _finite(value) for metric, value in fields.items()}
            row = ScoredRow(id=name, weight=weight, values=values, sums=sums)
        except (KeyError, AttributeError, TypeError, ValueError, RecursionError) as error:
            raise LimbeckError(
                f"{path}:{number}: got a line that is no scored row ({error}); expected an object with id, weight and "
                "metrics: delete the file and evaluate again"
            ) from error
        rows.append(row)
    return rows


def _finite(value: Any) -> float:
    """The number that a metric is, as it was read.

    Raises:
        ValueError: it is none that means could be taken of.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"got {str(value)[:40]!r}, expected a finite number")
    return value


def write_scores(run_dir: Path, *, before: Groups, after: Groups, seed: int = 0, resamples: int = RESAMPLES) -> Scores:
    """Write the rows of every group and then `scores.json`, which names them, and return the scores.

    Args:
        before: rows by group of metrics ("fidelity", "rouge"); may be empty in a half-finished run.
        after: the same after training.
    """
    scores = assemble(before, after, seed=seed, resamples=resamples)
    files: dict[str, dict[str, str]] = {"before": {}, "after": {}}
    for part, groups in (("before", before), ("after", after)):
        for group, rows in groups.items():
            files[part][group] = f"scores/{part}.{group}.jsonl"
            write_rows(run_dir / files[part][group], rows)
    document: dict[str, Any] = {
        "format": 1,
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "seed": seed,
        "metrics": {name: asdict(describe_metric(name)) for name in _in_order({**scores.before, **scores.after})},
        **{part: {name: asdict(s) for name, s in side.items()} for part, side in _parts(scores).items()},
        "rows": files,
    }
    measured = {split_stand_in(name)[1] for name in scores.after}
    if stand_ins := {name: text for name, text in STAND_INS.items() if name in measured}:
        document["stand_ins"] = stand_ins
    write_text(run_dir / "scores.json", json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return scores


def _in_order(names: Iterable[str]) -> list[str]:
    """As the metrics are listed; a metric's conditions one after another."""
    places = {name: place for place, name in enumerate(known_metrics())}
    return sorted(names, key=lambda name: places[name.partition("@")[0]])


def _parts(scores: Scores) -> dict[str, Mapping[str, Score]]:
    return {"before": scores.before, "after": scores.after, "change": scores.change}
