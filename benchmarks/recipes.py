"""The shipped recipes as they are: each run once, and the page with what came of it.

    python -m benchmarks.recipes kd csd gkd              # runs those that have not finished, one after another
    python -m benchmarks.recipes                         # the page alone: the runs that are there renew their rows
    python -m benchmarks.recipes sft --set 'prompts.source=dolly/*.jsonl'      # overrides of the recipes that are run

A row is one run with one seed, its intervals over held-out prompts (95 %). Minutes are the sum of all stages; memory is
the largest of the stages' peaks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.files import shipped_recipes
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import default_console

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- rows -->", "<!-- end of rows -->"
FIGURES = {
    "forward_kl": ("forward KL", True),
    "reverse_kl": ("reverse KL", True),
    "total_variation": ("total variation", False),
    "top1_agreement": ("top-1", True),
    "rouge_l": ("ROUGE-L to the teacher's", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="shipped recipes to run first")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "recipes.md")
    arguments = parser.parse_args()
    for name in arguments.names:
        recipe = load_recipe(name, [f"output_dir={arguments.out / name}", *arguments.set])
        run_pipeline(recipe, stages=STAGES, console=default_console())
    runs = {name: run for name in shipped_recipes() if finished(run := arguments.out / name)}
    text = arguments.page.read_text("utf-8")
    before, _, rest = text.partition(START)
    there, _, after = rest.partition(END)
    written = table(runs, kept=rows_of(there))
    arguments.page.write_text(f"{before}{START}\n\n{written}\n\n{END}{after}", "utf-8")
    print(written)


def finished(run: Path) -> bool:
    return (run / "scores.json").is_file() and "after" in read(run / "scores.json")


def rows_of(table: str) -> dict[str, str]:
    """The rows of a table by recipe; they outlive the runs they were made of."""
    return {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}


def table(runs: Mapping[str, Path], *, kept: Mapping[str, str]) -> str:
    """The table in the order of names.

    Args:
        kept: rows of earlier runs, for recipes that have none now.
    """
    head = ["recipe", *(label for label, _ in FIGURES.values()), "minutes", "MiB"]
    rows = {**kept}
    for name, run in runs.items():
        after = read(run / "scores.json")["after"]
        cells = [measured(after.get(metric), ranged) for metric, (_, ranged) in FIGURES.items()]
        stages = [read(path) for path in sorted((run / "stages").glob("*.json"))]
        minutes = sum(stage.get("seconds", 0.0) for stage in stages) / 60
        memory = max(stage.get("peak_memory_mib", 0) for stage in stages)
        rows[name] = row([f"`{name}`", *cells, f"{minutes:.1f}", f"{memory:,.0f}"])
    return "\n".join(
        [row(head), "|---|" + "---|" * len(FIGURES) + "---:|---:|", *(rows[name] for name in sorted(rows))]
    )


def measured(score: Mapping[str, Any] | None, ranged: bool) -> str:
    if score is None:
        return ""
    found = f"{score['mean']:.3f}"
    if ranged and score.get("low") is not None:
        found += f" ({score['low']:.3f} to {score['high']:.3f})"
    return found


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
