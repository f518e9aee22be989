"""A student that learns from a teacher with other tokens, against cross-entropy on the same texts, at equal tokens.

    python -m benchmarks.across teacher.model=TEACHER student.model=STUDENT     # writes docs/results/across.md
    python -m benchmarks.across teacher.model=... student.model=... train.max_steps=2 --out DIR --page FILE --seeds 0

A sweep around the recipe `seqkd`: the teacher answers the prompts once, and every arm trains on these answers in the
student's tokens, in the same order, the same steps. `ce` reads the labels alone; the others compare student and
teacher where the tokens of both coincide (`teacher.across`), alone or beside cross-entropy. Each arm has
the better of two learning rates by held-out loss with the first seed. Intervals are over prompts and seeds, 95 %, as
`limbeck compare` makes them; that of a change from `ce` is at the level that Holm's procedure leaves it among all pairs
of arms, and the change is separated where it leaves out 0. More groups, such as a task, are overrides; their metrics
are named with --metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.drafts import cells, columns_of, finished, tokens
from limbeck.compare.tables import Column
from limbeck.recipe.load import recipe_tree
from limbeck.sweep.runner import run_sweep

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
    text = page({arm: found for arm, found in runs.items() if found}, columns_of(ended.directory), arguments)
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


def page(runs: Mapping[str, Mapping[int, Path]], columns: Mapping[str, Column], arguments: argparse.Namespace) -> str:
    lines = [
        "| arm | metric | tokens | compared | after | each seed | change from ce | separated |",
        "|---|---|---:|---:|---:|---|---:|---|",
    ]
    for metric in arguments.metrics:
        if (column := columns.get(metric)) is not None:
            lines += [
                f"| `{arm}` | {metric} | {_cost(runs[arm])} | {said} |" for arm, said in cells(column, BASE).items()
            ]
    said = (__doc__ or "").split("\n\n")[-1].strip()
    command = " ".join(["python -m benchmarks.across", *arguments.overrides])
    seeds = ", ".join(map(str, arguments.seeds))
    return f"# Across tokenizers\n\n`{command}`, seeds {seeds}.\n\n{said}\n\n" + "\n".join(lines) + "\n"


def _cost(runs: Mapping[int, Path]) -> str:
    """The tokens of an arm and the share of them that were compared, as two cells."""
    shares = [_record(run).get("aligned") for run in runs.values()]
    share = f"{statistics.mean(one for one in shares if one is not None):.1%}" if all(shares) else ""
    return f"{statistics.mean(map(tokens, runs.values())):,.0f} | {share}"


def _record(run: Path) -> dict[str, Any]:
    return json.loads((run / "stages" / "train.json").read_text("utf-8"))


if __name__ == "__main__":
    main()
