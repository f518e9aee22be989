"""Responses, signal and scores on two ranks of one thread beside one: the same files, and how much faster.

    python -m benchmarks.ranks --out DIR [--width 128] [--prompts 192] [--model NAME]

A teacher (random and tiny, or a model by its name) writes responses, scores the data's answers and is compared with
the student before training. Wall time says how fast it was on this machine; the CPU time of the busiest rank beside
that of one process says how evenly the work was shared, also where other work takes the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import limbeck.pipeline.stage_order as order
from limbeck.pipeline.engine import run_pipeline
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import QuietConsole
from limbeck.runtime.files import write_json
from tests.tiny_pair import questions, write_model, write_prompts

# By what is measured: where the responses are from, the stages before, the stage itself, and its files.
WORK: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "responses and their signal": ("teacher", "prompts", "respond", ("responses",)),
    "signal of the data's answers": ("data", "respond", "teach", ("signal",)),
    "scores": ("data", "train", "evaluate", ("scores",)),
}


@dataclass(frozen=True)
class Times:
    """Seconds of a stage: on the clock, and of CPU time on each rank."""

    wall: float
    cpu: tuple[float, ...]


def recipe_of(args: argparse.Namespace, source: str, run: Path, ranks: int) -> Any:
    tree = {
        "output_dir": str(run),
        "teacher": {"model": args.model or str(args.out / "teacher")},
        "student": {"init": "depth_prune", "layers": args.layers // 2},
        "prompts": {"source": str(args.out / "prompts.jsonl"), "eval_fraction": 0.5},
        "responses": {"source": source, "max_new_tokens": args.tokens, "batch_size": args.batch},
        "objective": {"name": "fkl"},
        "train": {
            "max_steps": 1,
            "per_device_train_batch_size": 2 // ranks,
            "learning_rate": 1e-4,
            "compile": "off",
        },
        "evaluate": {
            "groups": {"rouge": {}, "fidelity": {}, "nll": {}},
            "max_new_tokens": args.tokens,
            "batch_size": args.batch,
        },
    }
    return load_recipe(tree)


def rank_does(args: argparse.Namespace, source: str, stage: str, run: Path, out: Path) -> None:
    """In a process of its own: bring a run to the end of a stage, and write down how long that took."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    recipe = recipe_of(args, source, run, ranks)
    wall, cpu = time.perf_counter(), time.process_time()
    run_pipeline(recipe, stages=order.STAGES, until=stage, console=QuietConsole())
    write_json(out, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})


def launched(args: argparse.Namespace, source: str, stage: str, run: Path, ranks: int) -> Times:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, files = [], [args.out / f"rank{rank}.json" for rank in range(ranks)]
    for rank, file in enumerate(files):
        if pid := os.fork():
            children.append(pid)
            continue
        code = 1
        try:
            env = {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in (env | {"MASTER_PORT": port}).items()}
            rank_does(args, source, stage, run, file)
            code = 0
        finally:
            os._exit(code)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert ends == [0] * ranks, ends
    found = [json.loads(file.read_text()) for file in files]
    return Times(wall=max(one["wall"] for one in found), cpu=tuple(one["cpu"] for one in found))


def content(root: Path, folders: Sequence[str]) -> dict[str, bytes]:
    files = [path for folder in folders for path in sorted((root / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--only", choices=list(WORK), help="measure one of the stages")
    for name, value in (("width", 128), ("layers", 4), ("prompts", 384), ("tokens", 48), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    write_model(args.out / "teacher", width=args.width, layers=args.layers)
    rows = [{"prompt": text, "completion": f"{text} " * 3} for text in questions(args.prompts)]
    write_prompts(args.out / "prompts.jsonl", rows)
    print("| what | one process: s, CPU s | two ranks: s, CPU s of each | wall | share of CPU | files |")
    print("|---|---|---|---|---|---|")
    for what, (source, before, stage, folders) in WORK.items():
        if args.only not in (None, what):
            continue
        begin = args.out / "begin"
        shutil.rmtree(begin, ignore_errors=True)
        launched(args, source, before, begin, 1)
        times, files = {}, {}
        for ranks in (1, 2):
            run = args.out / f"{ranks}"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(begin, run)
            times[ranks] = launched(args, source, stage, run, ranks)
            files[ranks] = content(run, folders)
        one, two = times[1], times[2]
        each = " and ".join(f"{cpu:.1f}" for cpu in two.cpu)
        same = f"{len(files[1])} the same" if files[1] == files[2] else "they differ"
        print(
            f"| {what} | {one.wall:.1f}, {one.cpu[0]:.1f} | {two.wall:.1f}, {each} | {one.wall / two.wall:.2f} x "
            f"| {one.cpu[0] / max(two.cpu):.2f} x | {same} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
