"""Memory of each rank while it loads a model and keeps its part: read by slices, and whole as one process reads it.

    python -m benchmarks.sharded_loading --out DIR

A random Llama of 0.9 GB in float32 lies in DIR, in float32 and in bfloat16; each rank makes a student of all its blocks
or of some and shards it, in a process of its own. What is said is the most that a rank ever had resident (VmHWM), less
what it had before.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

WIDTH, BLOCKS, VOCABULARY = 1024, 15, 32_000
WAYS = ("whole", "slices")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    asked.add_argument("--blocks", type=int, nargs="*", default=[BLOCKS, 8])
    out = asked.parse_args().out
    for stored in ("float32", "bfloat16"):
        if not (out / stored).exists():
            write_model(out / stored, stored)
    print("| files | blocks | ranks | way | share, MiB | largest tensor, MiB | most of any rank, MiB | s |")
    print("|---|---|---|---|---|---|---|---|")
    for stored in ("float32", "bfloat16"):
        for blocks, ranks, way in product(asked.parse_args().blocks, asked.parse_args().ranks, WAYS):
            share, largest, most, seconds = _measured(out / stored, blocks, ranks, way)
            numbers = f"{share:.0f} | {largest:.0f} | {most:.0f} | {seconds:.1f}"
            print(f"| {stored} | {blocks} | {ranks} | {way} | {numbers} |", flush=True)


def write_model(folder: Path, dtype: str) -> None:
    """Write the random Llama in a precision."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny_pair import write_tokenizer

    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2816,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="400MB")
    write_tokenizer(folder)


def _measured(folder: Path, blocks: int, ranks: int, way: str) -> tuple[float, float, float, float]:
    """Share and largest tensor of a rank, the most that any had, in MiB, and the seconds of the slowest."""
    code = f"from benchmarks.sharded_loading import load; load({str(folder)!r}, {blocks}, {way!r})"
    said = [line.split() for line in last_lines(code, ranks, timeout_s=300)]
    share, largest, most, seconds = ([float(one[column]) for one in said] for column in range(4))
    return share[0], largest[0], max(most), max(seconds)


def last_lines(code: str, ranks: int, *, timeout_s: float) -> list[str]:
    """The last line that Python code prints on each rank of a launch; one rank is a process alone, with both cores."""
    shared = {"OMP_NUM_THREADS": "1" if ranks > 1 else "2"}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(ranks):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""} if ranks > 1 else {}
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, env=os.environ | shared | mine, stdout=subprocess.PIPE, text=True))
    return [one.communicate(timeout=timeout_s)[0].splitlines()[-1] for one in started]


def load(folder: str, blocks: int, way: str) -> None:
    """Load and shard a student of so many blocks in this process, and print what it took."""
    from limbeck.models.slices import is_unread
    from limbeck.recipe.sections import TrainSection
    from limbeck.student.build import StudentSpec, build_student
    from limbeck.training import launch, sharding

    settings = TrainSection(sharding="full", compile="off")
    accelerator = launch.accelerator(settings, Path(folder), run_name="", tracker_config={})
    # What libraries are loaded with is no part of the model.
    build_student(StudentSpec(init="scratch", model=folder, config={"num_hidden_layers": 1, "vocab_size": 512}))
    before, started = resident("VmRSS"), time.perf_counter()
    spec = StudentSpec(model=folder)
    if blocks < BLOCKS:
        spec = StudentSpec(model=folder, init="depth_prune", keep=tuple(i * BLOCKS // blocks for i in range(blocks)))
    student = build_student(spec, unread=way == "slices").model
    assert is_unread(student) == (way == "slices")
    sharding.shard(student, accelerator, bf16=False)
    seconds = time.perf_counter() - started
    weights = list(student.parameters())
    share = sum(weight.to_local().numel() for weight in weights) * 4 / 2**20  # type: ignore[operator]
    largest = max(weight.numel() for weight in weights) * 4 / 2**20
    print(share, largest, resident("VmHWM") - before, seconds)
    accelerator.wait_for_everyone()


def resident(which: str) -> float:
    """MiB that this process has resident, now or at most until now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


if __name__ == "__main__":
    main()
