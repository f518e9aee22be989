"""Drafts for speculative decoding by the objective they were distilled with, at equal tokens: acceptance by arm.

    python -m benchmarks.drafts                 # writes docs/results/drafts.md; the same command goes on after a stop
    python -m benchmarks.drafts --estimate      # seconds of each arm from the runs that are done
    python -m benchmarks.drafts train.max_steps=2 teacher.model=MODEL student.layers=2 --out DIR --page FILE --seeds 0

A sweep around the recipe `draft`: seven of the teacher's blocks, the teacher's samples at temperature 1, the same steps
of the same number of responses, each arm at the best of some learning rates by total variation with the first seed.
Measured is the share of drafts that the teacher keeps at temperature 1 with four drafts per pass; and, on more text,
that of a first draft, which is 1 less the total variation to the teacher on its held-out answers. Intervals, those of
a change from forward KL too, resample prompts, with all seeds of a prompt together; an arm counts as separated where
that interval leaves out zero and every seed agrees in the sign.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.evaluation.scores.bootstrap import paired_change, summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.recipe.load import recipe_tree
from limbeck.sweep.runner import run_sweep
from limbeck.types import LimbeckError, Score, ScoredRow

ROOT = Path(__file__).resolve().parents[1]
BASE = "fkl"
CONDITION, ACCEPTANCE, FIRST = "draft=4", "draft_acceptance", "acceptance"
TITLES = {"Drafts that the teacher keeps": ACCEPTANCE, "A first draft, on the teacher's own text": FIRST}
DISTILLM2 = {
    # A batch counts responses: half of them are the teacher's, half the student's, so a step has as many tokens.
    "responses.source": {"name": "pairs", "refresh": "epoch"},
    "objective": {"name": "skl", "alpha": 0.1, "temperature": 1.0},
    "contrast": {
        "student": {"name": "srkl", "alpha": 0.1},
        "beta": "code",
        "beta_start": 0.5,
        "beta_end": 0.75,
        "scale": 2.0,
        "rule": {"name": "adaptive_alpha", "alpha0": 0.1, "low": 0.01, "high": 0.1, "warmup_epochs": 1},
    },
    "train.reduction": "sequence",
}
ARMS: dict[str, dict[str, Any]] = {
    "fkl": {"objective": {"name": "fkl", "temperature": 1.0}},
    "tv": {"objective": {"name": "tv", "temperature": 1.0}},
    "lk": {"objective": {"name": "lk", "temperature": 1.0}},
    "lk_lambda": {"objective": {"name": "lk", "form": "lambda", "eta": 3.0, "temperature": 1.0}},
    "csd": {"objective": {"name": "csd", "first": "teacher", "second": "student", "temperature": 1.0}},
    "distillm2": DISTILLM2,
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric of an arm.

    Attributes:
        name: of the metric.
        rows: one per prompt, all seeds together.
        by_seed: the metric of each seed.
    """

    name: str
    rows: Sequence[ScoredRow]
    by_seed: Mapping[int, float]

    @property
    def score(self) -> Score:
        return summarise(self.rows)[self.name]

    def change(self, base: Measure) -> Score:
        """This less the base, on the prompts that both have."""
        names = {row.id for row in base.rows} & {row.id for row in self.rows}
        before, after = ([row for row in one.rows if row.id in names] for one in (base, self))
        return paired_change(before, after)[self.name]

    def separated(self, base: Measure) -> bool:
        moved = self.change(base)
        if moved.low is None or moved.high is None or moved.low <= 0 <= moved.high:
            return False
        gaps = [self.by_seed[seed] - base.by_seed[seed] for seed in self.by_seed.keys() & base.by_seed.keys()]
        return all((gap > 0) == (moved.mean > 0) for gap in gaps)


@dataclass(frozen=True, kw_only=True)
class ArmScores:
    """The finished runs of an arm.

    Attributes:
        measures: of each metric, by its name.
        seconds: of the stages of a run, the mean.
        tokens: of the responses that entered the loss, the mean.
    """

    measures: Mapping[str, Measure]
    rate: str
    seconds: float
    tokens: float
    means: Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe of all arms, e.g. train.max_steps=100")
    parser.add_argument("--out", type=Path, default=Path("runs/sweeps/drafts"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "drafts.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="some of the arms, fkl among them")
    parser.add_argument("--estimate", action="store_true", help="only say what the runs that are done have taken")
    arguments = parser.parse_args()
    if arguments.estimate:
        print(estimate(arguments))
        return
    ended = run_sweep(sweep(arguments), *arguments.overrides)
    found = {arm: scores for arm in arguments.arms if (scores := scores_of(ended.directory, arm)) is not None}
    if BASE not in found:
        raise SystemExit(f"no run of {BASE} has finished; {ended.directory / 'arms.jsonl'} says why")
    text = page(found, arguments)
    arguments.page.write_text(text, "utf-8")
    print(text)
    print(estimate(arguments), file=sys.stderr)


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    # Arms set keys one by one: what the recipe's own objective has of options would stay.
    recipe = recipe_tree("draft") | {"objective": ARMS[BASE]["objective"]}
    return {
        "name": "drafts",
        "output_dir": str(arguments.out),
        "recipe": recipe,
        "set": {
            "train.max_steps": 300,
            "train.eval_steps": None,
            "train.warmup_steps": 20,
            "responses.max_new_tokens": 64,
            "evaluate.groups": {
                "fidelity": {},
                "speculation": {"draft_tokens": [4], "prompts": 48, "temperatures": []},
            },
        },
        "arms": {arm: ARMS[arm] for arm in arguments.arms},
        "tune": {"train.learning_rate": arguments.rates},
        "tune_metric": "total_variation",
        "seeds": arguments.seeds,
    }


def finished(folder: Path, arm: str | None = None) -> list[dict[str, Any]]:
    """The lines of arms.jsonl of runs that are done."""
    path = folder / "arms.jsonl"
    if not path.is_file():
        raise LimbeckError(f"{path} is not there; expected a sweep: run `python -m benchmarks.drafts` first")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if line["state"] == "done" and arm in (None, line["arm"])]


def scores_of(folder: Path, arm: str) -> ArmScores | None:
    """The scores of an arm's final runs; None where none is done."""
    lines = [line for line in finished(folder, arm) if not line["tuning"]]
    if not lines:
        return None
    runs = {line["seed"]: folder / line["directory"] for line in lines}
    after = {seed: json.loads((run / "scores.json").read_text("utf-8"))["after"] for seed, run in runs.items()}
    drafted = [read_rows(run / f"scores/after.speculation@{CONDITION}.jsonl") for run in runs.values()]
    compared = [read_rows(run / "scores/after.fidelity.jsonl") for run in runs.values()]
    key = f"{ACCEPTANCE}@{CONDITION}"
    names = ("forward_kl", f"tokens_per_pass@{CONDITION}")
    return ArmScores(
        measures={
            ACCEPTANCE: Measure(
                name=ACCEPTANCE,
                rows=summed(drafted),
                by_seed={seed: scores[key]["mean"] for seed, scores in after.items()},
            ),
            FIRST: Measure(
                name=FIRST,
                rows=averaged(compared),
                by_seed={seed: scores[FIRST]["mean"] for seed, scores in after.items()},
            ),
        },
        rate=f"{lines[0]['keys']['train.learning_rate']:g}",
        seconds=statistics.mean(map(seconds, runs.values())),
        tokens=statistics.mean(map(tokens, runs.values())),
        means={name: statistics.mean(scores[name]["mean"] for scores in after.values()) for name in names},
    )


def summed(tables: Sequence[Sequence[ScoredRow]]) -> list[ScoredRow]:
    """A row per prompt with the drafts of all seeds; prompts that not all have are left out."""
    return [
        ScoredRow(
            id=name,
            weight=1.0,
            values={},
            sums={ACCEPTANCE: tuple(map(sum, zip(*(row.sums[ACCEPTANCE] for row in rows), strict=True)))},
        )
        for name, rows in by_prompt(tables)
    ]


def averaged(tables: Sequence[Sequence[ScoredRow]]) -> list[ScoredRow]:
    """A row per prompt with the mean of all seeds, of the same tokens; prompts that not all have are left out."""
    return [
        ScoredRow(
            id=name,
            weight=rows[0].weight,
            values={FIRST: statistics.mean(row.values[FIRST] for row in rows)},
        )
        for name, rows in by_prompt(tables)
    ]


def by_prompt(tables: Sequence[Sequence[ScoredRow]]) -> Iterator[tuple[str, list[ScoredRow]]]:
    """The rows of each prompt that all tables have."""
    by_id = [{row.id: row for row in table} for table in tables]
    for row in tables[0]:
        if all(row.id in rows for rows in by_id):
            yield row.id, [rows[row.id] for rows in by_id]


def tokens(run: Path) -> float:
    last = (run / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
    return float(json.loads(last)["tokens"])


def seconds(run: Path) -> float:
    """Of the stages that this run did itself."""
    manifests = [json.loads(path.read_text("utf-8")) for path in (run / "stages").glob("*.json")]
    return sum(m.get("seconds") or 0.0 for m in manifests if not m.get("shared_from"))


def page(found: Mapping[str, ArmScores], arguments: argparse.Namespace) -> str:
    command = " ".join(["python -m benchmarks.drafts", *arguments.overrides])
    said = (__doc__ or "").split("\n\n")[-1].strip()
    seeds, rates = (", ".join(map(str, some)) for some in (arguments.seeds, arguments.rates))
    lines = [
        "# Drafts by objective",
        "",
        f"`{command}`; seeds {seeds}; rates {rates}.",
        "",
        said,
        "",
        "| arm | rate | tokens | tokens per pass | forward KL |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| `{arm}` | {scores.rate} | {scores.tokens:,.0f} | {scores.means[f'tokens_per_pass@{CONDITION}']:.2f} "
            f"| {scores.means['forward_kl']:.3f} |"
            for arm, scores in found.items()
        ),
        "",
    ]
    for title, measured in TITLES.items():
        lines += [f"## {title}", "", *table(found, measured), "", verdict(found, measured), ""]
    return "\n".join(lines)


def table(found: Mapping[str, ArmScores], measured: str) -> list[str]:
    base = found[BASE].measures[measured]
    lines = ["| arm | share | each seed | change from fkl | separated |", "|---|---:|---|---:|---|"]
    for arm, scores in found.items():
        one = scores.measures[measured]
        seeds = ", ".join(f"{value:.3f}" for value in one.by_seed.values())
        moved = (
            " | " if arm == BASE else f"{interval(one.change(base), '+')} | {'yes' if one.separated(base) else 'no'}"
        )
        lines.append(f"| `{arm}` | {interval(one.score)} | {seeds} | {moved} |")
    return lines


def interval(score: Score, sign: str = "") -> str:
    ends = "" if score.low is None else f" ({score.low:{sign}.3f} to {score.high:{sign}.3f})"
    return f"{score.mean:{sign}.3f}{ends}"


def verdict(found: Mapping[str, ArmScores], measured: str) -> str:
    """The sentence under a table."""
    base = found[BASE].measures[measured]
    best = max(found, key=lambda arm: found[arm].measures[measured].score.mean)
    if best == BASE:
        return "No arm is accepted more than forward KL."
    one = found[best].measures[measured]
    how = "by a separated interval" if one.separated(base) else "not separated from it"
    return f"`{best}` is accepted most: {interval(one.change(base), '+')} over forward KL, {how}."


def estimate(arguments: argparse.Namespace) -> str:
    """What a run of each arm has taken, and what the whole would: in seconds of this machine as it was then."""
    taken: dict[str, list[float]] = {}
    for line in finished(arguments.out):
        taken.setdefault(line["arm"], []).append(seconds(arguments.out / line["directory"]))
    means = {arm: statistics.mean(some) for arm, some in taken.items()}
    each = [f"{arm}: {mean:,.0f} s a run, {len(taken[arm])} done" for arm, mean in means.items()]
    arms, runs = len(arguments.arms), len(arguments.seeds) + len(arguments.rates) - 1
    whole = arms * runs * statistics.mean(means.values()) if means else float("nan")
    return "\n".join([*each, f"all {arms} arms, {runs} runs each: {whole:,.0f} s"])


if __name__ == "__main__":
    main()
