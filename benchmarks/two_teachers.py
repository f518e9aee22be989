"""Two small teachers, each expert on half of the problems, and the student that both teach, from scratch.

    python -m benchmarks.two_teachers              # writes docs/results/two-teachers.md; the same command goes on
    python -m benchmarks.two_teachers --steps 2 --problems 200 --out DIR --page FILE --seeds 0

The problems are chains of sums modulo 10 (`prompts.generate`), of two steps and of three. Each teacher is
trained with cross-entropy on one half. The student, of the teachers' size, learns their distributions on
worked answers, each problem from its own teacher (`combine: rule`), or from the mean of both
(`combine: mean_log_p`); beside it, the student of each teacher alone and one without teachers (cross-entropy on
both halves), all with the same problems, steps and rate. Accuracy is exact match of greedy answers to
held-out problems, with an interval over problems. A student holds an expert's half where the interval of its accuracy,
over all seeds, reaches the expert's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.evaluation.scores.bootstrap import summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import default_console
from limbeck.types import Score, ScoredRow

ROOT = Path(__file__).resolve().parents[1]
# Numbers of a chain: one more than its steps.
HALVES = {"short": 3, "long": 4}
SHORT_CHAIN = r"^\d[+-]\d[+-]\d\s*$"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/two-teachers"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "two-teachers.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--problems", type=int, default=40_000)
    arguments = parser.parse_args()
    teachers = {half: trained(arguments, f"teacher-{half}", 0, lengths=(n, n)) for half, n in HALVES.items()}
    arms = arms_of(teachers)
    runs = {
        name: [trained(arguments, name, seed, **options) for seed in arguments.seeds] for name, options in arms.items()
    }
    text = page(teachers, runs, arguments)
    arguments.page.write_text(text, "utf-8")
    print(text)


def arms_of(teachers: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The students by name, as sections of their recipes."""
    sections = {half: {"model": str(run / "student")} for half, run in teachers.items()}
    rule = {"name": "rule", "patterns": {"short": SHORT_CHAIN}, "otherwise": "long"}
    learns = {"objective": {"name": "fkl", "temperature": 1.0}}
    return {
        "both, routed": learns | {"teachers": sections, "combine": rule},
        "both, mean of log p": learns | {"teachers": sections, "combine": "mean_log_p"},
        **{f"{half} alone": learns | {"teacher": section} for half, section in sections.items()},
        "none": {},
    }


def trained(
    arguments: argparse.Namespace, name: str, seed: int, *, lengths: tuple[int, int] = (3, 4), **sections: Any
) -> Path:
    """A run that is made once."""
    folder = arguments.out / name.replace(",", "").replace(" ", "-") / f"seed{seed}"
    tree = {"name": folder.parent.name, "output_dir": str(folder), **base(arguments, lengths, seed), **sections}
    if "teachers" in sections:
        del tree["teacher"]
    return run_pipeline(load_recipe(tree), stages=STAGES, console=default_console()).root


def base(arguments: argparse.Namespace, lengths: tuple[int, int], seed: int) -> dict[str, Any]:
    """A recipe from scratch without a teacher, on chains of some lengths."""
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    shortest, longest = lengths
    problems = {"name": "chain", "count": arguments.problems, "shortest": shortest, "longest": longest}
    return {
        "teacher": {"model": "blank-bytes", "where": "none", "cache": False},
        "student": {"init": "scratch", "model": "blank-bytes", "config": shape | heads},
        "prompts": {"generate": problems, "eval_fraction": 0.02, "template": "plain"},
        "responses": {"source": "data", "max_new_tokens": 40},
        "objective": {"name": "ce"},
        "train": {
            "max_steps": arguments.steps,
            "learning_rate": 2.0e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "per_device_train_batch_size": 64,
            "weight_decay": 0.1,
            "save_steps": 400,
            "save_total_limit": 1,
            "seed": seed,
        },
        "evaluate": {"groups": {"tasks": {"heldout": True, "by_category": True, "max_new_tokens": 40}}, "samples": 0},
    }


def accuracy(runs: Sequence[Path], half: str) -> Score:
    """Accuracy on the problems of a half, of all runs together: the mean over runs for each problem."""
    name = f"after.tasks@heldout,{HALVES[half] - 1} steps.jsonl"
    return summarise(together([read_rows(run / "scores" / name) for run in runs], "accuracy"))["accuracy"]


def together(tables: Sequence[Sequence[ScoredRow]], metric: str) -> list[ScoredRow]:
    """A row per prompt with the mean over runs; prompts that not all have are left out."""
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


def page(teachers: Mapping[str, Path], runs: Mapping[str, Sequence[Path]], arguments: argparse.Namespace) -> str:
    experts = {half: accuracy([run], half) for half, run in teachers.items()}
    lines = ["| model | two steps | three steps | holds |", "|---|---|---|---|"]
    for half in teachers:
        cells = [_cell(experts[half]) if other == half else "not its half" for other in HALVES]
        lines.append(f"| the expert on {'two' if half == 'short' else 'three'} steps | {' | '.join(cells)} | |")
    for name, own in runs.items():
        found = {half: accuracy(own, half) for half in HALVES}
        held = [half for half in HALVES if reaches(found[half], experts[half])]
        lines.append(f"| {name} | {' | '.join(_cell(found[half]) for half in HALVES)} | {', '.join(held) or 'none'} |")
    said = (__doc__ or "").split("\n\n")[-1].strip()
    return (
        f"# Two teachers, one student\n\n{said}\n\n{arguments.problems:,} problems, {arguments.steps} steps of 64, "
        f"{len(arguments.seeds)} seeds of each student, one of each teacher.\n\n" + "\n".join(lines) + "\n"
    )


def reaches(student: Score, expert: Score) -> bool:
    """Whether the interval of a student reaches an expert's accuracy."""
    return student.high is not None and student.high >= expert.mean


def _cell(score: Score) -> str:
    return f"{score.mean:.3f} ({score.low:.3f} to {score.high:.3f})"


if __name__ == "__main__":
    main()
