"""What a run of many rows takes before training: memory and time of the stages prompts and respond.

    python -m benchmarks.rows                        # 5,000 and 20,000 rows
    python -m benchmarks.rows --rows 20000 100000

`asked` is the part of respond that reads the prompts of a run whose answers a server writes, before the first is asked.
Each size in a process of its own. Rows have 20 words of prompt and 80 of answer, 600 characters and about 150 tokens of
`blank-4k` with its chat template. Memory is what a stage takes at most beside what the process had before it; times are
CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("water", "stone", "light", "because", "answer", "question", "morning", "people", "seven", "history", "garden")


def write_rows(path: Path, rows: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            asked = " ".join(draw.choices(WORDS, k=draw.randint(10, 30)))
            said = " ".join(draw.choices(WORDS, k=draw.randint(40, 120)))
            file.write(json.dumps({"prompt": f"{row}: {asked}", "completion": said}) + "\n")


def stages_of(folder: Path) -> dict[str, Any]:
    """Memory and time of each part on the rows in a folder."""
    from limbeck.pipeline.context import RunContext
    from limbeck.pipeline.stages import prompts, respond
    from limbeck.prompts.io import StoredPrompts
    from limbeck.recipe.load import load_recipe
    from limbeck.runtime.memory import give_back_freed, peak_memory_mib, reset_peak_memory, resident_memory

    def context(rows: str, **responses: Any) -> RunContext:
        tree = {
            "teacher": {"model": "blank-4k", "where": "none", "cache": False},
            "student": {"init": "scratch", "model": "blank-4k"},
            "prompts": {"source": str(folder / rows), "too_long": "drop"},
            "responses": {"source": "data", "max_new_tokens": 400} | responses,
            "objective": {"name": "ce"},
            "output_dir": str(folder / rows.replace(".jsonl", "")),
        }
        return RunContext(load_recipe(tree))

    # What imports and first calls take is not the data's.
    some = context("some.jsonl")
    for stage in (prompts, respond):
        stage.STAGE.run(some)
    run, served = (
        context("rows.jsonl"),
        context("rows.jsonl", source="teacher", server={"base_url": "http://localhost"}),
    )
    _ = run.teacher.tokenizer, served.teacher.tokenizer
    parts: dict[str, Callable[[], object]] = {
        "prompts": lambda: prompts.STAGE.run(run),
        "asked": lambda: respond._read(served, StoredPrompts(served.run.prompts)),
        "respond": lambda: respond.STAGE.run(run),
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        give_back_freed()
        before, started = resident_memory(), time.process_time()
        reset_peak_memory()
        made = part()
        peak = peak_memory_mib() - before / 2**20
        found[name] = {"mib": round(peak, 1), "cpu_s": round(time.process_time() - started, 1)}
        del made
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 20_000])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(stages_of(options.folder)))
        return
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "rows.jsonl", rows)
            write_rows(Path(folder) / "some.jsonl", 300)
            command = [sys.executable, "-m", "benchmarks.rows", "--folder", folder]
            print(rows, subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


if __name__ == "__main__":
    main()
