"""What measuring fidelity costs beside the forward passes that it needs anyway.

    python -m benchmarks.fidelity                       20,000 tokens, three repeats
    python -m benchmarks.fidelity --tokens 2000 --repeats 1

SmolLM2-135M-Instruct and its own first and last nine blocks, float32, answers of 64 to 256 tokens of English in batches
of 16 rows. The forward passes are the hidden states of both models and the products of both heads, tile by tile, with
nothing done to the logits; fidelity is all of that and every metric, reliability curve and position. Both are timed
batch by batch in turns in one process, compilation apart in a first batch; a repeat's ratio is that of the sums, and
the median over the repeats counts. Memory is the peak of a process that does one of the two alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.evaluation.fidelity import measure
from limbeck.evaluation.token_metrics.tokens import FidelityChunk
from limbeck.models.forward import hidden_states
from limbeck.models.heads import head_of
from limbeck.models.loading import load_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.objectives.fused.tiles import TILE_ROWS
from limbeck.ops import onednn
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.prompts.sources import load_prompts
from limbeck.rollouts.collate import collate
from limbeck.runtime.memory import peak_memory_mib, reset_peak_memory
from limbeck.student.blocks import depth_prune
from limbeck.teachers.local import LocalTeacher
from limbeck.types import Head, Response, TokenBatch

KEEP = (*range(9), *range(21, 30))
SIDES = ("forward", "fidelity")
MEMORY_BATCHES = 2
PROMPT_TOKENS = 32
ANSWER_TOKENS = (64, 128, 192, 256)
TOP_K = 5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both models with their heads."""

    student: Any
    student_head: Head
    teacher: LocalTeacher
    tokenizer: Any

    @classmethod
    def load(cls) -> Pair:
        loaded = load_model("smollm2-135m-instruct", dtype="float32")
        vocab_size = real_vocab_size(loaded.tokenizer)
        student = depth_prune(loaded.model, KEEP).eval()
        return cls(
            student=student,
            student_head=head_of(student, vocab_size),
            teacher=LocalTeacher(loaded.model, head_of(loaded.model, vocab_size)),
            tokenizer=loaded.tokenizer,
        )

    def hidden(self, batch: TokenBatch) -> torch.Tensor:
        with torch.inference_mode():
            return hidden_states(self.student, batch)

    def forward(self, batch: TokenBatch) -> None:
        """Hidden states and head products of both models."""
        signal = self.teacher.signal(batch)
        for hidden_ND, head in ((self.hidden(batch), self.student_head), (signal.hidden_ND, signal.head)):
            weight_VD = head.weight_VD.detach()[: head.vocab_size]
            for tile_ND in hidden_ND.split(TILE_ROWS):
                if onednn.fits(tile_ND, weight_VD):
                    onednn.product(tile_ND, weight_VD)
                else:
                    torch.mm(tile_ND, weight_VD.T)

    def fidelity(self, batch: TokenBatch) -> None:
        lengths = tuple(batch.loss_mask_BT.sum(1).tolist())
        chunk = FidelityChunk(
            student_hidden_ND=self.hidden(batch),
            student_head=self.student_head,
            teacher=self.teacher.signal(batch),
            label_ids_N=batch.labels_N,
            ids=tuple(str(row) for row in batch.rows),
            lengths=lengths,
        )
        measure([chunk], top_k=TOP_K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="response tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--method", choices=("turns", *SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(measured(arguments.method, arguments.tokens)))
        return
    turns = []
    for repeat in range(arguments.repeats):
        turns.append(in_process("turns", arguments.tokens))
        print(f"repeat {repeat + 1}: {turns[-1]}", file=sys.stderr, flush=True)
    text = table(turns, {side: in_process(side, arguments.tokens) for side in SIDES})
    print(text)
    if arguments.out:
        arguments.out.write_text(text, "utf-8")


def in_process(method: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.fidelity", "--method", method, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(method: str, tokens: int) -> dict[str, float]:
    torch.set_grad_enabled(False)
    pair = Pair.load()
    batches = batches_of(answers(pair.tokenizer, tokens))
    work = {"forward": pair.forward, "fidelity": pair.fidelity}
    if method in work:
        reset_peak_memory()
        for batch in batches[:MEMORY_BATCHES]:
            work[method](batch)
        return {"peak_mib": peak_memory_mib()}
    first = {side: timed(work[side], batches[0]) for side in SIDES}
    seconds = dict.fromkeys(SIDES, 0.0)
    for batch in batches:
        for side in SIDES:
            seconds[side] += timed(work[side], batch)
    return {
        "tokens": sum(len(batch.labels_N) for batch in batches),
        "first_s": first["fidelity"],
        "forward_s": seconds["forward"],
        "fidelity_s": seconds["fidelity"],
        "ratio": seconds["fidelity"] / seconds["forward"],
    }


def timed(work: Any, batch: TokenBatch) -> float:
    begin = time.perf_counter()
    work(batch)
    return time.perf_counter() - begin


def answers(tokenizer: Any, tokens: int) -> list[Response]:
    """English of known length: what was asked, and then whatever is asked elsewhere in the built-in prompts."""
    prompts = load_prompts("builtin", heldout_fraction=0.1).prompts
    asked = (p.text or "\n".join(m.content for m in p.messages or ()) for p in prompts)
    ids = tokenizer("\n".join(asked), verbose=False)["input_ids"]
    found: list[Response] = []
    written = 0
    while written < tokens:
        length = ANSWER_TOKENS[len(found) % len(ANSWER_TOKENS)]
        start = (len(found) * 97) % (len(ids) - PROMPT_TOKENS - length)
        cut = start + PROMPT_TOKENS
        found.append(
            Response(
                prompt_id=str(len(found)),
                author="data",
                prompt_ids=tuple(ids[start:cut]),
                response_ids=tuple(ids[cut : cut + length]),
                stop="length",
                split="heldout",
            )
        )
        written += length
    return found


def batches_of(responses: Sequence[Response]) -> list[TokenBatch]:
    order = sorted(range(len(responses)), key=lambda i: (-responses[i].length, i))
    starts = range(0, len(order), SCORING_BATCH_SIZE)
    return [collate(responses, order[start : start + SCORING_BATCH_SIZE], pad_id=0) for start in starts]


def table(turns: list[dict[str, float]], peaks: dict[str, dict[str, float]]) -> str:
    median = {key: statistics.median(run[key] for run in turns) for key in turns[0]}
    ratios = [run["ratio"] for run in turns]
    extra = peaks["fidelity"]["peak_mib"] - peaks["forward"]["peak_mib"]
    return (
        "| tokens | forward passes, s | fidelity, s | ratio, median (min to max) | first batch, s "
        "| peak of the passes, MiB | extra peak of fidelity, MiB |\n|---|---|---|---|---|---|---|\n"
        f"| {median['tokens']:.0f} | {median['forward_s']:.1f} | {median['fidelity_s']:.1f} "
        f"| {median['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | {median['first_s']:.1f} "
        f"| {peaks['forward']['peak_mib']:.0f} | {extra:.0f} |\n"
    )


if __name__ == "__main__":
    main()
