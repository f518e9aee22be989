"""A sweep beside separate runs of the same arms: wall time end to end, and whether every bit is the same.

    python -m benchmarks.sweep                       # 6 temperatures x 2 objectives on the quickstart's pair
    python -m benchmarks.sweep --parallel 2          # two at a time on both sides
    python -m benchmarks.sweep train.max_steps=60 prompts.limit=200

Both sides are commands as a user types them, one after the other; with --parallel N both play N runs at a time with the
same number of threads each. The sweep goes first, so that it pays for whatever the first use of the machine costs
(kernels that are compiled, files that are read for the first time).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from limbeck.models.assets import ASSETS, fetch
from limbeck.recipe.load import to_yaml
from limbeck.sweep.arms import ArmRun, arms_of, final_runs
from limbeck.sweep.settings import Sweep, load_sweep
from limbeck.sweep.settings import settings_to_yaml as sweep_to_yaml

# Short enough for twelve separate runs, long enough that every stage has something to do.
SMALL = (
    "prompts.limit=96",
    "prompts.eval_fraction=0.2",
    "responses.max_new_tokens=64",
    "train.max_steps=24",
    "train.warmup_steps=4",
    "train.save_steps=100",
    "evaluate.max_new_tokens=48",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="A sweep beside separate runs: wall time and bits.")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, e.g. train.max_steps=60")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0, 8.0])
    parser.add_argument("--objectives", nargs="+", default=["fkl", "rkl"])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, on both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all runs at a time together")
    parser.add_argument("--folder", type=Path, help="keep the runs here; a temporary folder unless given")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table = _measured(arguments, arguments.folder or Path(scratch))
    print(table)
    if arguments.out:
        arguments.out.write_text(table, "utf-8")


def _measured(arguments: argparse.Namespace, folder: Path) -> str:
    sweep = load_sweep(
        {
            "name": "benchmark",
            "recipe": arguments.recipe,
            "output_dir": str(folder / "sweep"),
            "grid": {"objective.name": arguments.objectives, "objective.temperature": arguments.temperatures},
            "parallel": arguments.parallel,
        },
        (*SMALL, *arguments.overrides),
    )
    runs = [run for arm in arms_of(sweep) for run in final_runs(sweep, arm, {}, {})]
    if (folder / "sweep").exists() or (folder / "separate").exists():
        raise SystemExit(f"{folder} holds runs already; name an empty folder with --folder")
    for model in {runs[0].recipe.teacher.model, runs[0].recipe.student.model} & set(ASSETS):
        fetch(str(model))
    together = _sweep(sweep, folder, arguments.threads)
    print(f"sweep: {together:.1f} s", file=sys.stderr, flush=True)
    apart = _separately(runs, folder, arguments.parallel, arguments.threads // arguments.parallel)
    print(f"{len(runs)} separate runs: {apart:.1f} s", file=sys.stderr, flush=True)
    different = [name for run in runs for name in _different(run.directory, folder / "separate" / run.arm)]
    bits = "the same" if not different else f"{len(different)} files differ, {different[0]} the first"
    return "\n".join(
        [
            f"| {len(runs)} runs, {arguments.parallel} at a time | wall time, s | a run, s |",
            "|---|---:|---:|",
            f"| `limbeck sweep` | {together:.1f} | {together / len(runs):.1f} |",
            f"| separate `limbeck run` | {apart:.1f} | {apart / len(runs):.1f} |",
            "",
            f"The sweep is {apart / together:.2f} times as fast. Students and scored rows: {bits}.",
            "",
        ]
    )


def _sweep(sweep: Sweep, folder: Path, threads: int) -> float:
    path = folder / "sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sweep_to_yaml(sweep), "utf-8")
    started = time.perf_counter()
    _limbeck(["sweep", str(path)], threads)
    return time.perf_counter() - started


def _separately(runs: Sequence[ArmRun], folder: Path, parallel: int, threads: int) -> float:
    commands = []
    for run in runs:
        path = folder / "separate" / f"{run.arm}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(run.recipe), "utf-8")
        commands.append(["run", str(path), f"output_dir={folder / 'separate' / run.arm}"])
    started = time.perf_counter()
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(lambda command: _limbeck(command, max(1, threads)), commands))
    return time.perf_counter() - started


def _limbeck(command: Sequence[str], threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise SystemExit(f"limbeck {' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _different(run: Path, separate: Path) -> list[str]:
    """Files of students and scored rows that are not the same, byte for byte."""
    names = [path.relative_to(separate) for path in (separate / "student").glob("*.safetensors")]
    names += [path.relative_to(separate) for path in (separate / "scores").glob("*.jsonl")]
    if len(names) < 3:
        raise SystemExit(f"{separate} has no student with scores; expected a finished run")
    return [str(run / name) for name in names if (run / name).read_bytes() != (separate / name).read_bytes()]


if __name__ == "__main__":
    main()
