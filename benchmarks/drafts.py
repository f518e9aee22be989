"""Drafts for speculative decoding by the objective they were distilled with, at equal tokens: acceptance by arm.

    python -m benchmarks.drafts                 # writes docs/results/drafts.md; the same command goes on after a stop
    python -m benchmarks.drafts --estimate      # seconds of each arm from the runs that are done
    python -m benchmarks.drafts train.max_steps=2 teacher.model=MODEL student.layers=2 --out DIR --page FILE --seeds 0

A sweep around the recipe `draft`: seven of the teacher's blocks, the teacher's samples at temperature 1, the same steps
of the same number of responses, each arm at the best of some learning rates by total variation with the first seed.
Measured is the share of drafts that the teacher keeps at temperature 1 with four drafts per pass; and, on more text,
that of a first draft, which is 1 less the total variation to the teacher on its held-out answers. Intervals are over
prompts and seeds, 95 %, as `limbeck compare` makes them; that of a change from forward KL is at the level that Holm's
procedure leaves it among all pairs of arms, and the change is separated where it leaves out 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.compare.pairwise import ComparedPair
from limbeck.compare.runs import gather
from limbeck.compare.tables import Column, MetricTables
from limbeck.recipe.load import recipe_tree
from limbeck.sweep.runner import run_sweep
from limbeck.types import LimbeckError

ROOT = Path(__file__).resolve().parents[1]
BASE = "fkl"
PER_PASS = "tokens_per_pass@draft=4"
BESIDE = ("forward_kl", PER_PASS)
TITLES = {
    "Drafts that the teacher keeps": "draft_acceptance@draft=4",
    "A first draft, on the teacher's own text": "acceptance",
}
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
class ArmCost:
    """What the finished runs of an arm were and took.

    Attributes:
        seconds: of the stages of a run, the mean.
        tokens: of the responses that entered the loss, the mean.
    """

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
    found = {arm: cost for arm in arguments.arms if (cost := cost_of(ended.directory, arm)) is not None}
    if BASE not in found:
        raise SystemExit(f"no run of {BASE} has finished; {ended.directory / 'arms.jsonl'} says why")
    text = page(found, columns_of(ended.directory), arguments)
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


def cost_of(folder: Path, arm: str) -> ArmCost | None:
    """What an arm's final runs were and took; None where none is done."""
    lines = [line for line in finished(folder, arm) if not line["tuning"]]
    if not lines:
        return None
    runs = [folder / line["directory"] for line in lines]
    after = [json.loads((run / "scores.json").read_text("utf-8"))["after"] for run in runs]
    return ArmCost(
        rate=f"{lines[0]['keys']['train.learning_rate']:g}",
        seconds=statistics.mean(map(seconds, runs)),
        tokens=statistics.mean(map(tokens, runs)),
        means={name: statistics.mean(scores[name]["mean"] for scores in after) for name in BESIDE},
    )


def columns_of(folder: Path) -> Mapping[str, Column]:
    """The metrics of a sweep's finished runs, as a comparison has them."""
    return MetricTables(gather([folder], None, folder)).columns


def tokens(run: Path) -> float:
    last = (run / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
    return float(json.loads(last)["tokens"])


def seconds(run: Path) -> float:
    """Of the stages that this run did itself."""
    manifests = [json.loads(path.read_text("utf-8")) for path in (run / "stages").glob("*.json")]
    return sum(m.get("seconds") or 0.0 for m in manifests if not m.get("shared_from"))


def page(found: Mapping[str, ArmCost], columns: Mapping[str, Column], arguments: argparse.Namespace) -> str:
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
            f"| `{arm}` | {cost.rate} | {cost.tokens:,.0f} | {cost.means[PER_PASS]:.2f} "
            f"| {cost.means['forward_kl']:.3f} |"
            for arm, cost in found.items()
        ),
        "",
    ]
    for title, metric in TITLES.items():
        if (column := columns.get(metric)) is not None:
            lines += [f"## {title}", "", *table(column), "", verdict(column), ""]
    return "\n".join(lines)


def table(column: Column) -> list[str]:
    lines = ["| arm | share | each seed | change from fkl | separated |", "|---|---:|---|---:|---|"]
    return [*lines, *(f"| `{arm}` | {said} |" for arm, said in cells(column, BASE).items())]


def cells(column: Column, base: str) -> dict[str, str]:
    """Of each arm its value, that of each seed, its change from a base and whether it is separated, as table cells."""
    moved, said = changes(column, base), dict[str, str]()
    for number, arm in enumerate(column.arms):
        found, sheet = column.resampled.estimate(number), column.resampled.sheet
        ends = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
        seeds = ", ".join(f"{sheet.value_R[run]:.3f}" for _, run in sorted(sheet.runs[number].items()))
        said[arm.name] = f"{found.mean:.3f}{ends} | {seeds} | {changed(moved.get(arm.name))}"
    return said


def changes(column: Column, base: str) -> dict[str, ComparedPair]:
    """The difference of each arm from the base, tested among all pairs."""
    names = [arm.name for arm in column.arms]
    found = {}
    for (first, second), pair in column.ranked.pairs.items():
        if base == names[second]:
            found[names[first]] = pair
        elif base == names[first]:
            found[names[second]] = replace(pair, difference=-pair.difference)
    return found


def changed(pair: ComparedPair | None) -> str:
    """A difference with its interval and whether it is separated, as two cells of a table."""
    if pair is None:
        return " | "
    ends = (pair.difference - pair.half_width, pair.difference + pair.half_width)
    return f"{pair.difference:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f}) | {'yes' if pair.separated else 'no'}"


def verdict(column: Column) -> str:
    """The sentence under a table."""
    means = {arm.name: column.resampled.mean(number) for number, arm in enumerate(column.arms)}
    best = max(means, key=means.__getitem__)
    if best == BASE:
        return "No arm is accepted more than forward KL."
    pair = changes(column, BASE).get(best)
    if pair is None:
        return f"`{best}` is accepted most."
    how = "by a separated interval" if pair.separated else "not separated from it"
    return f"`{best}` is accepted most: {changed(pair).partition(' | ')[0]} over forward KL, {how}."


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
