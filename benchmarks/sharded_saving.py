"""Memory of the first rank while a sharded student is gathered and saved: in memory, and in files that are mapped.

    python -m benchmarks.sharded_saving --out DIR

A random Llama of 0.9 GB in float32 lies in DIR (that of `benchmarks.sharded_loading`). What is said is the most that
each rank had at any moment, less what it had before, apart for memory of its own (RssAnon) and for pages of files
(RssFile), which the system takes back where it wants them.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.sharded_loading import last_lines, resident, write_model

KINDS = ("RssAnon", "RssFile")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    chosen = asked.parse_args()
    folder = chosen.out / "float32"
    if not folder.exists():
        write_model(folder, "float32")
    print("| ranks | gathered | rank | own memory, MiB | pages of files, MiB | s |")
    print("|---|---|---|---|---|---|")
    for ranks in chosen.ranks:
        for way in ("memory", "files"):
            code = f"from benchmarks.sharded_saving import save; save({str(folder)!r}, {str(chosen.out)!r}, {way!r})"
            for rank, line in enumerate(last_lines(code, ranks, timeout_s=600)[:2]):
                print(f"| {ranks} | {way} | {rank} | {' | '.join(line.split())} |", flush=True)


def save(folder: str, out: str, way: str) -> None:
    """Load, shard, gather and save a student, and print what the last two took."""
    from limbeck.models.whole import whole, whole_on_first_rank
    from limbeck.recipe.sections import TrainSection
    from limbeck.student.build import StudentSpec, build_student
    from limbeck.student.saving import save_student
    from limbeck.training import launch, sharding

    settings = TrainSection(sharding="full", compile="off")
    accelerator = launch.accelerator(settings, Path(folder), run_name="", tracker_config={})
    student = build_student(StudentSpec(model=folder), unread=True)
    sharding.shard(student.model, accelerator, bf16=False)
    accelerator.wait_for_everyone()
    first, files = accelerator.process_index == 0, Path(out) / ".whole.partial"
    gathered = whole(student.model) if way == "memory" else whole_on_first_rank(student.model, files)
    started = time.perf_counter()
    with most_resident() as most, gathered as model:
        if first:
            save_student(model, student.tokenizer, Path(out) / "student")
    print(*(f"{most[kind]:.0f}" for kind in KINDS), f"{time.perf_counter() - started:.1f}")
    accelerator.wait_for_everyone()


@contextmanager
def most_resident() -> Iterator[dict[str, float]]:
    """MiB of each kind that this process had at most inside the block, less what it had before."""
    before, over = {kind: resident(kind) for kind in KINDS}, threading.Event()
    most: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    def watch() -> None:
        while not over.wait(0.005):
            most.update({kind: max(most[kind], resident(kind) - before[kind]) for kind in KINDS})

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield most
    finally:
        over.set()
        watching.join()


if __name__ == "__main__":
    main()
