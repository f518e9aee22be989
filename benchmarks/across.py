"""A student that learns from a teacher with other tokens, against cross-entropy on the same texts, at equal tokens.

    python -m benchmarks.across teacher.model=TEACHER student.model=STUDENT     # writes docs/results/across.md
    python -m benchmarks.across teacher.model=... student.model=... train.max_steps=2 --out DIR --page FILE --seeds 0

A sweep around the recipe `seqkd`: the teacher answers the prompts once, and every arm trains on these answers in the
student's tokens, in the same order, the same steps. `ce` reads the labels alone; the others compare student and
teacher where the tokens of both coincide (`teacher.across`), alone or beside cross-entropy. Each arm has
the better of two learning rates by held-out loss with the first seed. Intervals resample prompts, with the mean over
seeds for each; an arm counts as separated where the interval of its change from `ce` leaves out zero and every seed
agrees in the sign. More groups, such as a task, are overrides; their metrics are named with --metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.drafts import finished, interval, tokens
from limbeck.evaluation.scores.bootstrap import paired_change, summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.recipe.load import recipe_tree
from limbeck.sweep.runner import run_sweep
from limbeck.types import Score, ScoredRow

ROOT = Path(__file__).resolve().parents[1]
BASE = "ce"
ARMS: dict[str, dict[str, Any]] = {
    "ce": {"objective": {"name": "ce", "temperature": 1.0}, "teacher.cache": False},
    "fkl": {"objective": {"name": "fkl", "temperature": 1.0}},
    "fkl_ce": {
        "objective": {
            "name": "sum",
            "options": {"parts": [{"name": "fkl", "weight": 0.5}, {"name": "ce", "weight": 0.5}]},
            "temperature": 1.0,
        }
    },
    "rkl_ce": {
        "objective": {
            "name": "sum",
            "options": {"parts": [{"name": "rkl", "weight": 0.5}, {"name": "ce", "weight": 0.5}]},
            "temperature": 1.0,
        }
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe of all arms, e.g. train.max_steps=100")
    parser.add_argument("--out", type=Path, default=Path("runs/sweeps/across"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "across.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5])
    parser.add_argument("--metrics", nargs="+", default=["nll", "rouge_l"])
    arguments = parser.parse_args()
    ended = run_sweep(sweep(arguments), *arguments.overrides)
    runs = {arm: runs_of(ended.directory, arm) for arm in ARMS}
    if not runs[BASE]:
        raise SystemExit(f"no run of {BASE} has finished; {ended.directory / 'arms.jsonl'} says why")
    text = page({arm: found for arm, found in runs.items() if found}, arguments)
    arguments.page.write_text(text, "utf-8")
    print(text)


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": "across",
        "output_dir": str(arguments.out),
        "recipe": recipe_tree("seqkd"),
        "set": {
            "teacher.across": {},
            "student.init": "pretrained",
            "student.layers": None,
            "train.max_steps": 300,
            "train.eval_steps": None,
            "responses.max_new_tokens": 128,
            "evaluate.groups": ["nll", "rouge"],
        },
        "arms": ARMS,
        "tune": {"train.learning_rate": arguments.rates},
        "tune_metric": "nll",
        "seeds": arguments.seeds,
    }


def runs_of(folder: Path, arm: str) -> dict[int, Path]:
    """The finished runs of an arm by seed, those that tuned it left out."""
    return {line["seed"]: folder / line["directory"] for line in finished(folder, arm) if not line["tuning"]}


def rows_of(run: Path, metric: str) -> list[ScoredRow]:
    """The rows of a metric after training."""
    for path in sorted((run / "scores").glob("after.*.jsonl")):
        rows = [row for row in read_rows(path) if metric in row.values]
        if rows:
            return rows
    return []


def together(tables: Sequence[Sequence[ScoredRow]], metric: str) -> list[ScoredRow]:
    """A row per prompt with the mean over seeds; prompts that not all have are left out."""
    by_id = [{row.id: row for row in table} for table in tables]
    return [
        ScoredRow(
            id=row.id,
            weight=row.weight,
            values={metric: statistics.mean(rows[row.id].values[metric] for rows in by_id)},
        )
        for row in tables[0]
        if all(row.id in rows for rows in by_id)
    ]


def page(runs: Mapping[str, Mapping[int, Path]], arguments: argparse.Namespace) -> str:
    lines = [
        "| arm | metric | tokens | compared | after | each seed | change from ce | separated |",
        "|---|---|---:|---:|---:|---|---:|---|",
    ]
    for metric in arguments.metrics:
        tables = {arm: {seed: rows_of(run, metric) for seed, run in found.items()} for arm, found in runs.items()}
        for arm, by_seed in tables.items():
            if all(by_seed.values()):
                lines.append(_line(arm, metric, by_seed, tables[BASE], runs[arm]))
    said = (__doc__ or "").split("\n\n")[-1].strip()
    command = " ".join(["python -m benchmarks.across", *arguments.overrides])
    seeds = ", ".join(map(str, arguments.seeds))
    return f"# Across tokenizers\n\n`{command}`, seeds {seeds}.\n\n{said}\n\n" + "\n".join(lines) + "\n"


def _line(
    arm: str,
    metric: str,
    by_seed: Mapping[int, Sequence[ScoredRow]],
    base: Mapping[int, Sequence[ScoredRow]],
    runs: Mapping[int, Path],
) -> str:
    own = together(list(by_seed.values()), metric)
    means = {seed: summarise(rows)[metric].mean for seed, rows in by_seed.items()}
    compared = [_record(run).get("aligned") for run in runs.values()]
    share = f"{statistics.mean(one for one in compared if one is not None):.1%}" if all(compared) else ""
    moved, verdict = "", ""
    if arm != BASE and all(base.values()):
        change = _change(together(list(base.values()), metric), own, metric)
        gaps = [means[seed] - summarise(base[seed])[metric].mean for seed in means.keys() & base.keys()]
        apart = change.low is not None and change.high is not None and not change.low <= 0 <= change.high
        moved = interval(change, sign="+")
        verdict = "yes" if apart and len({gap > 0 for gap in gaps}) == 1 else "no"
    count = statistics.mean(map(tokens, runs.values()))
    seeds = ", ".join(f"{mean:.3f}" for mean in means.values())
    after = interval(summarise(own)[metric])
    return f"| `{arm}` | {metric} | {count:,.0f} | {share} | {after} | {seeds} | {moved} | {verdict} |"


def _change(before: Sequence[ScoredRow], after: Sequence[ScoredRow], metric: str) -> Score:
    names = {row.id for row in before} & {row.id for row in after}
    sides = [[row for row in rows if row.id in names] for rows in (before, after)]
    return paired_change(*sides)[metric]


def _record(run: Path) -> dict[str, Any]:
    return json.loads((run / "stages" / "train.json").read_text("utf-8"))


if __name__ == "__main__":
    main()
