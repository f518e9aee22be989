"""Sampling alone: tokens per second of `LocalSampler` against ``model.generate`` with the same settings.

    python -m benchmarks.sampling --model DIR [--prompts FILE] [--batch 48] [--new-tokens 64] [--pairs 3] [--sizes
    24,48,96]

Both sides answer the same prompts of mixed length in turns, in one process; a pair is one run of each. Tokens are
those of the responses up to their end, so slots behind a finished row count for nobody. `--sizes` then runs ours
alone at other batch sizes, on as many prompts as the largest needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from limbeck.models.heads import causal_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.prompts.sources import load_prompts
from limbeck.prompts.templates import encode_prompts
from limbeck.sampling.local import LocalSampler
from limbeck.types import Sampling, TokenPrompt


@dataclass(frozen=True)
class Timed:
    """One run over all prompts."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def timed(run: Callable[[], int]) -> Timed:
    begin = time.perf_counter()
    tokens = run()
    return Timed(tokens, time.perf_counter() - begin)


def ours(sampler: LocalSampler, prompts: Sequence[TokenPrompt], sampling: Sampling) -> int:
    return sum(len(response.response_ids) for response in sampler.respond(prompts, sampling))


def theirs(model: PreTrainedModel, eos: int, prompts: Sequence[TokenPrompt], sampling: Sampling, batch: int) -> int:
    """`generate` on left-padded batches in the order given; tokens up to the end of each response."""
    torch.manual_seed(sampling.seed)
    tokens = 0
    for first in range(0, len(prompts), batch):
        rows = prompts[first : first + batch]
        width = max(len(prompt.ids) for prompt in rows)
        ids_BT = torch.full((len(rows), width), eos)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(rows):
            ids_BT[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask_BT[row, width - len(prompt.ids) :] = 1
        generate: Any = model.generate
        written_BT = generate(
            ids_BT,
            attention_mask=mask_BT,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )[:, width:]
        for row in written_BT.tolist():
            tokens += row.index(eos) + 1 if eos in row else len(row)
    return tokens


def compare(sampler: LocalSampler, prompts: Sequence[TokenPrompt], sampling: Sampling, pairs: int) -> None:
    model = causal_model(sampler.model)
    eos = sampler.eos_token_ids[0]
    generated, sampled = [], []
    for pair in range(pairs):
        settings = replace(sampling, seed=pair)
        generated.append(timed(lambda: theirs(model, eos, prompts, settings, sampler.batch_size)))  # noqa: B023
        sampled.append(timed(lambda: ours(sampler, prompts, settings)))  # noqa: B023
        print(
            f"pair {pair}: generate {generated[-1].tokens} tokens {generated[-1].rate:6.1f} tokens/s | "
            f"limbeck {sampled[-1].tokens} tokens {sampled[-1].rate:6.1f} tokens/s | "
            f"ratio {sampled[-1].rate / generated[-1].rate:.2f}",
            flush=True,
        )
    ratios = [mine.rate / other.rate for mine, other in zip(sampled, generated, strict=True)]
    print(
        f"median: generate {statistics.median(run.rate for run in generated):.1f} tokens/s, "
        f"limbeck {statistics.median(run.rate for run in sampled):.1f} tokens/s, ratio {statistics.median(ratios):.2f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens per second of sampling, against model.generate.")
    parser.add_argument("--model", required=True, help="a model directory or hub id")
    parser.add_argument("--prompts", default="builtin", help="a prompt source of limbeck")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--sizes", default="", help="batch sizes for ours alone, such as 24,48,96")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    sizes = [int(size) for size in options.sizes.split(",") if size]
    loaded = load_prompts(options.prompts, heldout_fraction=0.1).prompts
    prompts = encode_prompts(loaded[: max([options.batch, *sizes])], tokenizer)
    sampler = LocalSampler(
        model=model,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.eos_token_id,
        vocab_size=real_vocab_size(tokenizer),
        author="teacher",
        batch_size=options.batch,
    )
    sampling = Sampling(max_new_tokens=options.new_tokens, temperature=0.8, top_p=0.95)
    first = prompts[: options.batch]
    lengths = sorted(len(prompt.ids) for prompt in first)
    print(
        f"{options.batch} prompts of {lengths[0]} to {lengths[-1]} tokens (median {lengths[len(lengths) // 2]}), "
        f"{options.new_tokens} new tokens, T=0.8, top_p=0.95, {options.dtype}, {torch.get_num_threads()} threads"
    )
    compare(sampler, first, sampling, options.pairs)
    for size in sizes:
        run = timed(lambda: ours(replace(sampler, batch_size=size), prompts, sampling))  # noqa: B023
        print(f"limbeck, batch {size:4d}, {len(prompts)} prompts: {run.rate:6.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
