"""Everything about limbeck that a GPU alone can tell, in some 25 minutes, as one table.

    python -m benchmarks.gpu_day                       an H100 or H200; the same command continues
    python -m benchmarks.gpu_day --device cpu --small  a rehearsal on tiny shapes: its numbers mean nothing

In this order, each part kept below --out when it is done and skipped from then on: the kernel's tests; its step beside
those of TRL and Liger; whole runs of kd, distillm2 and gkd on the embedded pair, bfloat16, with tokens per second and
memory; TRL's trainers on the same pair; ten seeds of each step from skew KL to DistiLLM-2 on the laboratory's bench
(they need Dolly: --dolly 'dolly/train-*.jsonl'). A part is not begun after --minutes, so that a lease may end at any
time; what a part printed is in --out/PART.log.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.runtime.files import read_json, write_json, write_text

METHODS = ("floor", "autograd fkl", "trl", "liger chunked js, compiled", "limbeck fkl", "limbeck rkl", "limbeck js")
SHAPES = ((2048, 49152, 576), (8192, 151936, 2048))
SMALL_SHAPES = ((64, 512, 32),)
RECIPES = ("kd", "distillm2", "gkd")
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the day.

    Attributes:
        minutes: about how long it takes on an H100; it is not begun with less than that left.
        measure: gives the rows of its table.
    """

    name: str
    minutes: float
    measure: Callable[[argparse.Namespace, Path], list[Row]]


def kernel_tests(chosen: argparse.Namespace, log: Path) -> list[Row]:
    """The tests of the fused loss that run on this device."""
    file = "test_gpu.py" if chosen.device == "cuda" else "test_skews.py"
    done = command([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/objectives/{file}"], log)
    return [{"what": "kernel's tests", "figure": done.splitlines()[-1]}]


def loss_steps(chosen: argparse.Namespace, log: Path) -> list[Row]:
    """The loss step beside its rivals, over the four products that no full-vocabulary method avoids."""
    rows: list[Row] = []
    for n, v, d in SMALL_SHAPES if chosen.small else SHAPES:
        out = chosen.out / f"loss-step-{n}-{v}.md"
        options = ["--n", str(n), "--v", str(v), "--d", str(d), "--device", chosen.device, "--out", str(out)]
        dtype = ["--dtype", "bfloat16"] if chosen.device == "cuda" else []
        command(module("benchmarks.loss_step", *options, *dtype, "--only", *METHODS), log)
        for line in out.read_text("utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if len(cells) == 7 and not set(cells[0]) <= {"-"} and cells[0] != "method":
                figure = f"{cells[1]} of the floor, {cells[3]} a step, {cells[5]} MiB"
                rows.append({"what": f"{cells[0]}, N={n} V={v} D={d}", "figure": figure})
    return rows


def whole_runs(chosen: argparse.Namespace, log: Path) -> list[Row]:
    """Whole runs of shipped recipes on the embedded pair."""
    rows = []
    for name in RECIPES[:1] if chosen.small else RECIPES:
        root = chosen.out / name
        small = ["train.max_steps=2", "prompts.limit=12", "evaluate.groups=[fidelity]", "student.layers=4"]
        precision = ["train.bf16=true"] if chosen.device == "cuda" else []
        overrides = [f"output_dir={root}", *precision, *(small if chosen.small else [])]
        command(module("limbeck", "run", name, *overrides), log)
        rows.append({"what": f"limbeck {name}, whole", "figure": summary(root)})
    return rows


def summary(root: Path) -> str:
    """Tokens per second of the training, seconds and memory of a run, and what it did to the forward KL."""
    train, scores = read_json(root / "stages" / "train.json"), read_json(root / "scores.json")
    seconds = sum(read_json(path).get("seconds", 0.0) for path in sorted((root / "stages").glob("*.json")))
    before, after = (scores[part]["forward_kl"]["mean"] for part in ("before", "after"))
    memory = max(read_json(path).get("peak_device_memory_mib", 0) for path in sorted((root / "stages").glob("*.json")))
    return (
        f"{train['loop_tokens_per_s']:,.0f} tokens/s in training, {seconds:.0f} s in all"
        + (f", {memory:,} MiB of the device at most" if memory else "")
        + f", forward KL {before:.3f} -> {after:.3f}"
    )


def rivals(chosen: argparse.Namespace, log: Path) -> list[Row]:
    """A training step and an on-policy step beside TRL's trainers."""
    rows = []
    steps = ["--steps", "1", "--repeats", "1"] if chosen.small else ["--steps", "30", "--repeats", "2"]
    run = ["--run", str(chosen.out / "kd")]
    for name, more in (("train_step", run), ("on_policy", [])):
        out = chosen.out / f"{name}.md"
        command(module(f"benchmarks.{name}", *more, *steps, "--device", chosen.device, "--out", str(out)), log)
        for line in out.read_text("utf-8").splitlines()[2:]:
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            rows.append({"what": f"{cells[0]}, {name.replace('_', ' ')}", "figure": f"{cells[1]} tokens/s"})
    return rows


def ten_seeds(chosen: argparse.Namespace, log: Path) -> list[Row]:
    """Skew KL, DistiLLM, contrast, growing beta, adaptive alpha: ten seeds of each."""
    if chosen.dolly is None:
        return [{"what": "ten seeds", "figure": "not run: give Dolly with --dolly"}]
    root = chosen.out / "lab-distillm-steps"
    seeds = "[0]" if chosen.small else "[0,1,2,3,4,5,6,7,8,9]"
    overrides = [f"output_dir={root}", f"sweep.seeds={seeds}", f"prompts.source={chosen.dolly}", "sweep.parallel=1"]
    command(module("limbeck", "sweep", "lab/distillm-steps", *overrides), log)
    found: dict[str, list[float]] = {}
    for line in (root / "arms.jsonl").read_text("utf-8").splitlines():
        arm = json.loads(line)
        if not arm["tuning"] and arm["state"] == "done":
            after = read_json(root / arm["directory"] / "scores.json")["after"]
            found.setdefault(arm["arm"], []).append(after["total_variation"]["mean"])
    return [
        {"what": f"{arm}, {len(values)} seeds", "figure": f"total variation {sum(values) / len(values):.4f}"}
        for arm, values in found.items()
    ]


PARTS = (
    Part("kernel-tests", 1.5, kernel_tests),
    Part("loss-steps", 3, loss_steps),
    Part("whole-runs", 7, whole_runs),
    Part("rivals", 4, rivals),
    Part("ten-seeds", 8, ten_seeds),
)


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def command(line: Sequence[str], log: Path) -> str:
    """What a command printed; all of it goes into the log of its part, too.

    Raises:
        SystemExit: it failed, with its last lines.
    """
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(line)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        raise SystemExit(f"{' '.join(line[:4])} ended with {done.returncode}:\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout.strip()


def table(found: Sequence[tuple[str, list[Row]]], device: str) -> str:
    """All rows, with the machine they come from."""
    lines = [device, "", "| part | what | figure |", "|---|---|---|"]
    lines += [f"| {part} | {row['what']} | {row['figure']} |" for part, rows in found for row in rows]
    return "\n".join(lines) + "\n"


def machine(device: str) -> str:
    import torch
    import transformers

    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU, a rehearsal"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-day"))
    parser.add_argument("--minutes", type=float, default=25.0, help="no part is begun that would end later")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dolly", help="files of Dolly, for the ten seeds")
    parser.add_argument("--small", action="store_true", help="tiny shapes and few steps, to rehearse")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    chosen = parser.parse_args()
    import torch

    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; rehearse with --device cpu --small")
    chosen.out.mkdir(parents=True, exist_ok=True)
    started, found = time.monotonic(), []
    for part in PARTS:
        if chosen.only and part.name not in chosen.only:
            continue
        kept = chosen.out / f"{part.name}.json"
        if not kept.exists():
            left = chosen.minutes - (time.monotonic() - started) / 60
            if left < part.minutes:
                found.append((part.name, [{"what": "not begun", "figure": f"{left:.1f} minutes left"}]))
                continue
            write_json(kept, part.measure(chosen, chosen.out / f"{part.name}.log"))
        found.append((part.name, read_json(kept)))
        write_text(chosen.out / "table.md", table(found, machine(chosen.device)))
        print(f"{part.name}: done after {(time.monotonic() - started) / 60:.1f} min", file=sys.stderr, flush=True)
    print(table(found, machine(chosen.device)))


if __name__ == "__main__":
    main()
