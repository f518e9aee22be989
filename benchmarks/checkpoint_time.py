"""Time that a training loses to its checkpoints, written beside the next steps or while nothing else goes on.

    python -m benchmarks.checkpoint_time --out DIR

A random student of 0.13 billion weights (1.6 GB a checkpoint) trains some steps in float32, on one process and on two
between which it is sharded, with a checkpoint after every second step and with none. What is lost is the time beyond
that of the training without checkpoints, for each of them; the peak is the most that a rank had resident (VmHWM) in its
steps, beyond what it had without checkpoints. Medians of several trainings, turn about.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from statistics import median

from benchmarks.sharded_loading import last_lines, resident

WAYS = ("none", "foreground", "background")
STEPS, EVERY = 9, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    asked = parser.parse_args()
    print("| ranks | checkpoints | s per step | lost for each, s (least to most) | peak beside, MiB |")
    print("|---|---|---|---|---|")
    for ranks in asked.ranks:
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(asked.times):
            for way in WAYS:
                found[way].append(_measured(asked.out, ranks, way))
        plain, resident = (median(one[column] for one in found["none"]) for column in range(2))
        print(f"| {ranks} | none | {plain / STEPS:.2f} | | |")
        for way in WAYS[1:]:
            lost = sorted((seconds - plain) / (STEPS // EVERY) for seconds, _ in found[way])
            peak = median(peak for _, peak in found[way]) - resident
            step = median(seconds for seconds, _ in found[way]) / STEPS
            print(
                f"| {ranks} | {way} | {step:.2f} | {median(lost):.2f} ({lost[0]:.2f} to {lost[-1]:.2f}) | {peak:.0f} |",
                flush=True,
            )


def _measured(folder: Path, ranks: int, way: str) -> tuple[float, float]:
    """Seconds of the slowest rank's steps, and the most that any rank had resident, in MiB."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    code = f"from benchmarks.checkpoint_time import steps; steps({str(folder)!r}, {way!r})"
    said = [json.loads(line) for line in last_lines(code, ranks, timeout_s=1200)]
    return max(one["seconds"] for one in said), max(one["peak"] for one in said)


def steps(folder: str, way: str) -> None:
    """Train in this process, and print what it took."""
    from limbeck.training.background import Background
    from tests.training.play import play, settings, tiny_model, tiny_responses

    if way == "foreground":
        Background.begin = lambda self, work, *, reads_weights: work(lambda: None)  # type: ignore[method-assign]
    sharded = "WORLD_SIZE" in os.environ
    chosen = settings(
        max_steps=STEPS,
        save_steps=1000 if way == "none" else EVERY,
        save_total_limit=2,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        sharding="full" if sharded else "none",
    )
    student = tiny_model(1, width=1024, layers=14)
    # The loading is over; what comes now is the training's.
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    play(student, Path(folder), chosen, responses=tiny_responses(400))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main()
