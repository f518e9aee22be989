"""The data plane: responses on disk and in memory, and what micro-batches by tokens are worth.

    python -m benchmarks.data responses              # a million synthetic responses; needs 8 GB of disk for a while
    python -m benchmarks.data responses --rows 20000 --out DIR
    python -m benchmarks.data padding                # what steps of mixed lengths are padded, by the way they are cut
    python -m benchmarks.data batches                # steps on the quickstart's student, cut by rows and by tokens
    python -m benchmarks.data batches --layers 2 --step-rows 16

`responses` writes synthetic responses, opens them in a process of its own and takes steps of 64 from them. What the
same numbers cost as Python's own (the lines read whole) is measured on some of them. Times are CPU seconds of one
thread, so that other processes of the machine count little; the wall clock stands beside them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.types import Response, Sampling

STEP_ROWS, STEPS = 64, 200
PROMPT_SHARE = 0.28
AS_BEFORE_ROWS = 10_000


def synthetic(rows: int, tokens: int) -> Iterator[Response]:
    """Responses of random ids; prompts and answers vary in length around the shares of a run of instructions."""
    draw, sampling = np.random.default_rng(0), Sampling(max_new_tokens=tokens)
    pool = draw.integers(0, 49_152, 1 << 22).tolist()
    for row in range(rows):
        prompt = int(tokens * PROMPT_SHARE)
        prompt += int(draw.integers(-prompt // 2, prompt // 2 + 1))
        start = int(draw.integers(0, len(pool) - 2 * tokens))
        ids = pool[start : start + tokens]
        yield Response(
            prompt_id=f"{row:016x}",
            author="teacher",
            prompt_ids=tuple(ids[:prompt]),
            response_ids=tuple(ids[prompt:]),
            stop="eos",
            sampling=sampling,
            split="heldout" if row % 100 == 0 else "train",
        )


@dataclass
class Spent:
    """CPU and wall-clock seconds of a block."""

    cpu: float = 0.0
    wall: float = 0.0


@contextmanager
def clock() -> Iterator[Spent]:
    spent, cpu, wall = Spent(), time.process_time(), time.perf_counter()
    yield spent
    spent.cpu, spent.wall = time.process_time() - cpu, time.perf_counter() - wall


def resident() -> dict[str, float]:
    """MiB of this process in memory: its own, and pages of files, which all processes share and the system may drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return {"own": found["RssAnon"], "files": found["RssFile"]}


def grown(before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in resident().items()}


def open_and_step(path: Path) -> dict[str, Any]:
    """Open the responses, form the order of an epoch and collate the batches of some steps."""
    from limbeck.rollouts.collate import collate
    from limbeck.rollouts.sources import OfflineSource, SourceContext, StepCounter
    from limbeck.rollouts.table import open_responses

    # What an import and a first call cost is not the data's.
    collate(list(synthetic(1, 8)), [0], pad_id=0)
    before = resident()
    with clock() as opening:
        train = open_responses(path).answered("train").responses
    opened = grown(before)
    with clock() as planning:
        source = OfflineSource(train, SourceContext(step_rows=STEP_ROWS, seed=0))
        first = source.step(StepCounter(step=0, total=STEPS))
    planned = grown(before)
    with clock() as stepping:
        for step in range(STEPS):
            by_row = source.step(StepCounter(step=step, total=STEPS))
            collate(by_row, tuple(by_row), pad_id=0)
    return {
        "rows": len(train),
        "first": len(first),
        "open_s": vars(opening),
        "plan_s": vars(planning),
        "step_s": vars(stepping),
        "opened_mib": opened,
        "planned_mib": planned,
        "stepped_mib": grown(before),
    }


def as_before(path: Path) -> dict[str, Any]:
    """Read the first lines whole, as Python's numbers, and write them line by line."""
    from limbeck.rollouts.io import read_responses, write_responses

    before = resident()
    with clock() as reading:
        every = read_responses(path)
    held = grown(before)
    with clock() as writing:
        write_responses(path.with_name("again.jsonl"), every)
    return {"rows": len(every), "read_s": vars(reading), "write_s": vars(writing), "mib": held}


def in_a_process(part: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", part, "--path", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_responses(rows: int, tokens: int, out: Path) -> dict[str, Any]:
    from limbeck.rollouts.table import keep_responses

    path = out / "teacher.jsonl"
    # Making them is not writing them; what it takes is known from some.
    some = min(rows, AS_BEFORE_ROWS)
    with clock() as making:
        for _ in synthetic(some, tokens):
            pass
    with clock() as both:
        keep_responses(path, synthetic(rows, tokens))
    sizes = {suffix: path.with_suffix(suffix).stat().st_size for suffix in (".jsonl", ".arrow")}
    first = out / "first.jsonl"
    with path.open("rb") as lines, first.open("wb") as file:
        file.writelines(islice(lines, some))
    return {
        "rows": rows,
        "tokens": tokens,
        "write_s": {"cpu": both.cpu - making.cpu * rows / some, "wall": both.wall - making.wall * rows / some},
        "bytes": sizes,
        "read": in_a_process("open", path),
        "before": in_a_process("before", first),
    }


def mixed_responses(count: int, vocabulary: int, longest: int) -> list[Response]:
    """Prompts of 30 to 120 tokens, answers log-normal with a tail."""
    draw = random.Random(0)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(number))

    return [
        Response(
            prompt_id=str(i),
            author="teacher",
            prompt_ids=ids(draw.randint(30, 120)),
            response_ids=ids(min(longest, max(1, round(draw.lognormvariate(4.2, 0.8))))),
            stop="length",
        )
        for i in range(count)
    ]


def steps_of(responses: Sequence[Response], step_rows: int) -> dict[str, list[dict[int, Response]]]:
    """Steps of an epoch, whose rows are of similar length, and steps of rows as they come, as where the student writes
    anew for each."""
    from limbeck.rollouts.order import Plan
    from limbeck.rollouts.sources import longest_first

    plan, starts = Plan.of(responses, step_rows=step_rows, seed=0), range(0, len(responses), step_rows)
    return {
        "epoch": [{row: responses[row] for row in rows} for rows in plan.epoch(0)],
        "step": [longest_first(responses[start : start + step_rows]) for start in starts],
    }


def measure_padding(step_rows: int, budgets: Sequence[int]) -> dict[str, dict[str, float]]:
    """The share of padding and the passes of a step by the way it is cut; packing could save no more than that."""
    from limbeck.rollouts.collate import cut_by_rows, cut_by_tokens, padding

    found: dict[str, dict[str, float]] = {}
    for order, by_rows in steps_of(mixed_responses(64 * step_rows, 100, 256), step_rows).items():
        cuts: dict[str, list[list[tuple[int, ...]]]] = {
            f"{rows} rows": [cut_by_rows(tuple(by_row), rows) for by_row in by_rows] for rows in (step_rows, 8, 2)
        }
        cuts |= {f"{tokens} tokens": [cut_by_tokens(by_row, tokens) for by_row in by_rows] for tokens in budgets}
        for name, chunks in cuts.items():
            found[f"{order}, {name}"] = {
                "padding": float(np.mean([padding(*pair) for pair in zip(by_rows, chunks, strict=True)])),
                "passes_per_step": float(np.mean([len(some) for some in chunks])),
            }
    return found


def of_a_few_layers(model: str, layers: int) -> Any:
    """The model with so many of its blocks, in float32."""
    from torch import nn

    from limbeck.models.heads import decoder_of
    from limbeck.models.loading import load_model

    loaded = load_model(model, dtype="float32")
    decoder = decoder_of(loaded.model)
    decoder.layers = nn.ModuleList(list(decoder.get_submodule("layers").children())[:layers])
    loaded.model.config.num_hidden_layers = layers
    return loaded.model


def measure_batches(
    model: str, layers: int, steps: int, step_rows: int, budgets: Sequence[int], orders: Sequence[str]
) -> dict[str, Any]:
    """Forward and backward passes on mixed lengths, the steps cut by rows and by budgets of tokens, padded and packed.

    The loss is the cross-entropy of the labels; that of each step is compared with the first way's.
    """
    import torch

    from limbeck.models.forward import hidden_states, packed_states
    from limbeck.models.heads import head_of
    from limbeck.objectives import fused_distillation_loss
    from limbeck.objectives.sums import CrossEntropy
    from limbeck.rollouts.collate import collate, cut_by_rows, cut_by_tokens, padding

    torch.set_num_threads(1)
    student = of_a_few_layers(model, layers)
    vocabulary = student.config.vocab_size
    head = head_of(student, vocabulary)
    responses = mixed_responses(steps * step_rows, vocabulary, 256)
    chosen = {order: by_rows for order, by_rows in steps_of(responses, step_rows).items() if order in orders}
    ways: dict[str, tuple[Any, Any]] = {f"{rows} rows": (cut_by_rows, rows) for rows in (step_rows,)}
    ways |= {f"{tokens} tokens": (cut_by_tokens, tokens) for tokens in budgets}
    forwards = {"padded": hidden_states, "packed": packed_states}
    found: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    for order, by_rows in chosen.items():
        for name, (cut, size) in ways.items():
            for kind, forward in forwards.items():
                pads, passes, values = [], 0, []
                with clock() as spent:
                    for by_row in by_rows:
                        total, tokens = 0.0, sum(r.tokens for r in by_row.values())
                        if cut is cut_by_tokens:
                            chunks = cut_by_tokens(by_row, size, packed=kind == "packed")
                        else:
                            chunks = cut_by_rows(tuple(by_row), size)
                        for rows in chunks:
                            batch = collate(by_row, rows, pad_id=0)
                            weight_N = torch.full(batch.labels_N.shape, 1 / tokens)
                            hidden_ND, objective = forward(student, batch), CrossEntropy()
                            loss = fused_distillation_loss(
                                hidden_ND,
                                head,
                                None,
                                objective,
                                weight_N=weight_N,
                                label_N=batch.labels_N,
                                compile="off",
                            ).loss
                            loss.backward()
                            total += loss.item()
                        student.zero_grad()
                        values.append(total)
                        pads.append(0.0 if kind == "packed" else padding(by_row, chunks))
                        passes += len(chunks)
                first = losses.setdefault(order, values)
                found[f"{order}, {name}, {kind}"] = {
                    "tokens_per_cpu_s": sum(r.length for by_row in by_rows for r in by_row.values()) / spent.cpu,
                    "padding": float(np.mean(pads)),
                    "passes_per_step": passes / steps,
                    "gap": max(abs(a - b) for a, b in zip(values, first, strict=True)),
                }
    return {"model": model, "layers": layers, "steps": steps, "step_rows": step_rows, "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("responses", "padding", "batches", "open", "before"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=712, help="of prompt and response together")
    parser.add_argument("--out", type=Path, help="folder for what is written; a temporary one is deleted afterwards")
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--step-rows", type=int, default=32)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--orders", nargs="+", choices=("epoch", "step"), default=["epoch", "step"])
    options = parser.parse_args()
    if options.part == "open":
        print(json.dumps(open_and_step(options.path)))
    elif options.part == "before":
        print(json.dumps(as_before(options.path)))
    elif options.part == "padding":
        print(json.dumps(measure_padding(options.step_rows, options.budgets), indent=2))
    elif options.part == "batches":
        found = measure_batches(
            options.model, options.layers, options.steps, options.step_rows, options.budgets, options.orders
        )
        print(json.dumps(found, indent=2))
    else:
        out = options.out or Path(tempfile.mkdtemp())
        out.mkdir(parents=True, exist_ok=True)
        try:
            print(json.dumps(measure_responses(options.rows, options.tokens, out), indent=2))
        finally:
            if options.out is None:
                shutil.rmtree(out)


if __name__ == "__main__":
    main()
