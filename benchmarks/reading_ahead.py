"""The next micro-batch read in a thread while the student computes on a CPU, and read where it is wanted.

    python -m benchmarks.reading_ahead --out DIR
    OMP_NUM_THREADS=1 python -m benchmarks.reading_ahead --out DIR        # a core is left for the thread

A small student (two blocks of the quickstart's width with 4,096 ids, random weights), whose steps are short beside the
reading, learns on a CPU from a store of signals of random states, in micro-batches of 8 rows. Both ways take turns on
the same blocks of steps, which are compared in pairs, by the clock and by CPU seconds of all threads. "Cold" has the
system drop the pages of the store before each step, so that they are read from the disk. A run reads ahead for CUDA
devices alone: here a thread is given what it does there, but for pinned memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.objectives import Temperature, build_objective
from limbeck.pipeline.capturing import capture_into
from limbeck.recipe.sections import TrainSection
from limbeck.rollouts.sources import OfflineSource, SourceContext, StepCounter, known_step_of
from limbeck.runtime.folders import remove
from limbeck.runtime.spin_waits import short_spins_when_busy
from limbeck.teachers.store.base import Codec, Frame
from limbeck.teachers.store.dense import Hidden
from limbeck.teachers.store.manifest import Manifest, TeacherIdentity
from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.source import StoredSignals
from limbeck.teachers.store.sparse import TopK
from limbeck.teachers.store.writer import writing
from limbeck.training.loop import training_run
from limbeck.training.loss import LossPlan
from limbeck.training.metrics import LoopContext
from limbeck.training.progress import Progress
from limbeck.training.run import TrainingRun
from limbeck.types import DenseSignal, Head, Response, Support, TokenBatch

IDS, WIDTH, ROWS, MICROS, STEPS = 4096, 576, 8, 2, 2
SIGNALS: dict[str, tuple[Codec, Support]] = {
    "hidden, float32": (Hidden(), "full"),
    "hidden, bfloat16": (Hidden(dtype="bfloat16"), "full"),
    "topk, k=64": (TopK(k=64), "topk_tail"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the stores")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; {asked.pairs} pairs of {STEPS} steps of {MICROS} x {ROWS} rows\n")
    print(
        "| signal | pages | ms to read a micro-batch | of its step | tokens/s, where it is wanted | ahead "
        "| ratio, median (min to max) | of CPU seconds |\n|---|---|---:|---:|---:|---:|---|---|"
    )
    texts = responses(STEPS * MICROS * ROWS)
    for name, (codec, support) in SIGNALS.items():
        folder = asked.out / name.replace(", ", "-").replace("=", "")
        capture(folder / "store", codec, texts)
        run = prepared(folder, texts, support, asked.layers)
        for cold in (False, True):
            with short_spins_when_busy():
                cells = measured(run, folder, asked.pairs, cold=cold)
            print(f"| {name} | {'cold' if cold else 'warm'} | {cells} |", flush=True)


def responses(count: int) -> list[Response]:
    """Random ids in the lengths of the quickstart's answers."""
    draw = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(3, IDS, (length,), generator=draw).tolist())

    return [
        Response(prompt_id=str(i), author="teacher", prompt_ids=ids(30, 60), response_ids=ids(40, 90), stop="length")
        for i in range(count)
    ]


@dataclass(frozen=True)
class Drawn:
    """A teacher that says something random."""

    head: Head

    def signal(self, batch: TokenBatch) -> DenseSignal:
        return DenseSignal(hidden_ND=torch.randn(len(batch.labels_N), WIDTH), head=self.head)


def capture(path: Path, codec: Codec, texts: list[Response]) -> None:
    """Write a store of random signals of some texts."""
    remove(path)
    identity = TeacherIdentity(
        name="drawn", fingerprint="", configuration="", dtype="float32", attention="sdpa", weight_bytes=0
    )
    frame = Frame(vocab_size=IDS, width=WIDTH, temperatures=(1.0,))
    heldout = codec if isinstance(codec, Hidden) else Hidden()
    manifest = Manifest(teacher=identity, tokenizer="", template={}, frame=frame, codec=codec, heldout=heldout)
    head = Head(weight_VD=torch.randn(IDS, WIDTH) / WIDTH**0.5, vocab_size=IDS)
    with writing(path, manifest, say=print) as writer:
        capture_into(writer, Drawn(head), texts, advance=lambda tokens: None)


def prepared(folder: Path, texts: list[Response], support: Support, layers: int) -> TrainingRun:
    """A training of a fresh student on a store."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=IDS, hidden_size=WIDTH, num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    settings = TrainSection(
        max_steps=10_000,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=MICROS,
        learning_rate=1e-6,
        compile="off",
    )

    def source(context: SourceContext) -> OfflineSource:
        return OfflineSource(texts, context)

    return training_run(
        LlamaForCausalLM(config),
        source,
        StoredSignals(Store(folder / "store"), torch.device("cpu")),
        LossPlan(objective=build_objective("fkl"), support=support),
        temperature=Temperature(),
        schedule={},
        settings=settings,
        vocab_size=IDS,
        pad_id=0,
        context=LoopContext(
            checkpoints=folder / "checkpoints", metrics=folder / "metrics.jsonl", learning_rate=folder / "rate.json"
        ),
    )


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of all threads on a core."""

    clock: float
    cpu: float


def measured(run: TrainingRun, folder: Path, pairs: int, *, cold: bool) -> str:
    """The cells of a row."""
    pages = sorted((folder / "store").glob("0*.safetensors")) if cold else []
    blocks: dict[bool, list[Spent]] = {False: [], True: []}
    block(run, pages, ahead=False)
    for pair in range(pairs):
        for ahead in (pair % 2 == 0, pair % 2 == 1):
            blocks[ahead].append(block(run, pages, ahead=ahead))
    both = list(zip(blocks[False], blocks[True], strict=True))
    steps = [run.response_source.step(StepCounter(step=step, total=run.total)) for step in range(STEPS)]
    tokens = sum(response.tokens for step in steps for response in step.values())
    here, there = (statistics.median(tokens / spent.clock for spent in blocks[ahead]) for ahead in (False, True))
    read = statistics.median(reading(run, step, pages) for step in steps * 4)
    share = read * STEPS / statistics.median(spent.clock for spent in blocks[False])
    clock, cpu = [h.clock / t.clock for h, t in both], [h.cpu / t.cpu for h, t in both]
    return f"{1000 * read / MICROS:.1f} | {share:.2%} | {here:.0f} | {there:.0f} | {spread(clock)} | {spread(cpu)}"


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def block(run: TrainingRun, pages: list[Path], *, ahead: bool) -> Spent:
    """What some steps take."""
    # `pin_of` gives none for a CPU; the copy into pinned memory is left out.
    run.passes.micro_batches.pin = (lambda tensor: tensor) if ahead else None
    began = Spent(time.perf_counter(), time.process_time())
    for step in range(STEPS):
        drop(pages)
        clock, following = StepCounter(step=step, total=run.total), StepCounter(step=step + 1, total=run.total)
        known = partial(known_step_of, run.response_source, following) if step + 1 < STEPS else None
        progress = Progress(step=step)
        run.gradients(run.response_source.step(clock), run.settings_at(progress), progress, following=known)
        run.passes.clip()
        run.passes.update(1e-6)
    return Spent(time.perf_counter() - began.clock, time.process_time() - began.cpu)


def reading(run: TrainingRun, by_row: dict[int, Response], pages: list[Path]) -> float:
    """Seconds to read the micro-batches of a step, with nothing beside it."""
    drop(pages)
    began = time.perf_counter()
    for rows in run.passes.chunks(by_row, ranks=1):
        run.passes.micro_batches.read(by_row, rows)
    return time.perf_counter() - began


def drop(pages: list[Path]) -> None:
    """Have the system drop the pages of some files."""
    for path in pages:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
