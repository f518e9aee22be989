"""DPO from a distilled student against DPO from an SFT student, at equal steps: likelihood win rates, three seeds.

    python -m benchmarks.preference                              # about four hours on two free cores
    python -m benchmarks.preference prompts.limit=64             # any change of the recipe of all arms
    python -m benchmarks.preference evaluate.groups.judge.base_url=ADDRESS   # a judge beside the teacher's likelihood
    python -m benchmarks.preference --judge http://localhost:8000/v1         # the DPO'd starts beside each other by it
    python -m benchmarks.preference sweep.seeds=[0] --page ""    # a look

Three starts are trained on as many responses of the same teacher: `sft` (cross-entropy), `kd` (forward KL) and
`distillm2` (pairs). Each is evaluated as it is and after as many steps of DPO, on pairs of its own answers that the
teacher ranks. It is one sweep, whose stages are made once where arms share them; the same command goes on where it was
stopped, and when all is done it writes the page from the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.head_to_head import JUDGEMENTS, judge_at, judge_section, judged_arms, win_rate_cells
from limbeck.compare.runs import Comparison, gather
from limbeck.compare.tables import Column, MetricTables
from limbeck.evaluation.scores.files import read_rows
from limbeck.report.read_run import number
from limbeck.runtime.console import default_console
from limbeck.runtime.files import write_text
from limbeck.sweep.runner import run_sweep

STARTS: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"name": "ce"}},
    "kd": {},
    "distillm2": {
        "responses.source": {"name": "pairs", "refresh": "epoch"},
        "objective": {"name": "skl", "alpha": 0.1},
        "contrast": {
            "student": {"name": "srkl", "alpha": 0.1},
            "beta": "code",
            "rule": {"name": "adaptive_alpha", "alpha0": 0.1, "low": 0.01, "high": 0.1, "warmup_epochs": 1},
        },
        "train.num_train_epochs": 2,
        "train.reduction": "sequence",
    },
}
PREFERENCE: dict[str, Any] = {
    "pairs": {"name": "teacher", "samples": 4, "temperature": 0.8, "top_p": 0.95},
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "beta": 0.1,
    "save_steps": 8,
}
TUNED = tuple(f"{name}-dpo" for name in STARTS)
METRICS = ("answer_logp", "likelihood_win_rate", "win_rate", "forward_kl", "rouge_l")
ROWS = "after.likelihood.jsonl"


def tree(out: Path, steps: int, rate: float) -> dict[str, Any]:
    """The sweep: each start as it is, and after DPO."""
    arms: dict[str, dict[str, Any]] = {}
    for name, changes in STARTS.items():
        arms[name] = dict(changes) or {"objective.name": "fkl"}
        arms[f"{name}-dpo"] = arms[name] | {"preference": PREFERENCE | {"max_steps": steps, "learning_rate": rate}}
    groups = {"fidelity": {}, "rouge": {}, "likelihood": {"against": "teacher"}}
    return {
        "name": "preference",
        "output_dir": str(out),
        "recipe": "kd",
        "set": {"evaluate.groups": groups, "evaluate.max_new_tokens": 64},
        "arms": arms,
        "seeds": [0, 1, 2],
    }


def page(comparison: Comparison, command: str, judged: Sequence[str] = ()) -> str:
    """What came out, as Markdown.

    Args:
        judged: lines of the judge's section, where one was asked.
    """
    columns = MetricTables(comparison).columns
    shown = [columns[name] for name in METRICS if name in columns]
    lines = [
        "# Preference tuning from a distilled start",
        "",
        f"Written by `{command}` from {sum(len(arm.members) for arm in comparison.arms)} runs.",
        "Intervals are over held-out prompts and seeds, 95 %, as `limbeck compare` makes them; a difference is",
        "separated where its interval, at the level that Holm's procedure leaves it, excludes 0.",
        "",
        *_arms_table(comparison, shown),
        "",
        "## Starts after the same DPO",
        "",
        "First less second.",
        "",
        *_differences(shown),
        "",
        "## Beside each other",
        "",
        "How often the teacher finds the first start's answer after DPO likelier per token than the second's; ties",
        "half.",
        "",
        *_head_to_head(comparison),
        "",
        *((*judged, "") if judged else ()),
        "## Preference tuning itself",
        "",
        *_tuning(comparison),
        "",
    ]
    return "\n".join(lines)


def _arms_table(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    rows = [
        "| arm | " + " | ".join(f"{c.about.label}{f', {c.about.unit}' * bool(c.about.unit)}" for c in columns) + " |"
    ]
    rows.append("|---|" + "---:|" * len(columns))
    for arm in comparison.arms:
        cells = []
        for column in columns:
            if arm not in column.arms:
                cells.append("")
                continue
            found = column.resampled.estimate(column.arms.index(arm))
            spread = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
            cells.append(f"{found.mean:.3f}{spread}")
        rows.append(f"| {arm.name} | {' | '.join(cells)} |")
    return rows


def _differences(columns: Sequence[Column]) -> list[str]:
    rows = ["| starts | metric | difference | interval | separated |", "|---|---|---:|---|---|"]
    for column in columns:
        names = [arm.name for arm in column.arms]
        for (first, second), pair in column.resampled.pairs.items():
            ends = (names[first], names[second])
            if all(name.endswith("-dpo") for name in ends) or _same_start(*ends):
                low, high = pair.difference - pair.half_width, pair.difference + pair.half_width
                said = f"{pair.difference:+.4f} | {low:+.4f} to {high:+.4f} | {'yes' if pair.separated else 'no'}"
                rows.append(f"| {ends[0]} - {ends[1]} | {column.about.label} | {said} |")
    return rows


def _same_start(first: str, second: str) -> bool:
    return first.removesuffix("-dpo") == second.removesuffix("-dpo")


def _likelihoods(comparison: Comparison, arm: str) -> dict[int, Mapping[str, float]]:
    """The teacher's mean log-likelihood of each held-out answer, by seed."""
    members = next(one.members for one in comparison.arms if one.name == arm)
    return {
        member.seed: {row.id: row.values["answer_logp"] for row in read_rows(member.run.directory / "scores" / ROWS)}
        for member in members
        if member.run is not None
    }


def _head_to_head(comparison: Comparison) -> list[str]:
    rows = ["| starts | win rates by seed | mean | interval |", "|---|---|---:|---|"]
    for second, first in combinations(TUNED, 2):
        ours, theirs = _likelihoods(comparison, first), _likelihoods(comparison, second)
        wins = {seed: _wins(ours[seed], theirs[seed]) for seed in ours if seed in theirs}
        rows.append(f"| {first} over {second} | {win_rate_cells(wins)} |")
    return rows


def _wins(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[float]:
    """1, 1/2 or 0 for each prompt."""
    return [0.5 if own == theirs[name] else float(own > theirs[name]) for name, own in ours.items()]


def _tuning(comparison: Comparison) -> list[str]:
    rows = [
        "| arm | seed | pairs | steps | last margin | last accuracy | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in comparison.arms:
        for member in arm.members:
            stages = () if member.run is None else member.run.stages
            for stage in (one for one in stages if one["stage"] == "prefer"):
                values = [number(stage, key) or 0.0 for key in ("pairs", "steps", "reward_margin", "reward_accuracy")]
                minutes = (number(stage, "seconds") or 0.0) / 60
                rows.append(
                    f"| {arm.name} | {member.seed} | {values[0]:.0f} | {values[1]:.0f} | {values[2]:.4f} | "
                    f"{values[3]:.3f} | {minutes:.1f} |"
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO from distilled starts against DPO from an SFT start.")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe of all arms, or sweep.KEY=VALUE")
    # Of 288 training prompts some give no pair; all arms take as many steps.
    parser.add_argument("--dpo-steps", type=int, default=32)
    parser.add_argument("--dpo-rate", type=float, default=5.0e-6, help="learning rate of DPO")
    parser.add_argument("--out", type=Path, default=Path("runs/sweeps/preference"), help="directory of the sweep")
    parser.add_argument("--page", default="docs/results/preference.md", help="page to write; empty only prints it")
    parser.add_argument("--judge", metavar="BASE_URL", help="server that judges the starts after DPO by logprobs")
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's name there; without it the only model")
    arguments = parser.parse_args()
    try:
        end = run_sweep(tree(arguments.out, arguments.dpo_steps, arguments.dpo_rate), *arguments.overrides)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    if end.failed:
        raise SystemExit(f"{end.failed} of {end.runs} runs failed; see {end.page}, and run the same command again")
    command = " ".join(["python -m benchmarks.preference", *sys.argv[1:]])
    comparison, judged = gather([arguments.out], None, arguments.out), list[str]()
    if arguments.judge:
        judge = judge_at(arguments.judge, arguments.judge_model)
        sides = judged_arms(comparison, TUNED, judge, arguments.out / JUDGEMENTS, default_console())
        judged = judge_section(sides, judge.model)
    text = page(comparison, command, judged)
    print(text)
    if arguments.page:
        write_text(Path(arguments.page), text)


if __name__ == "__main__":
    main()
