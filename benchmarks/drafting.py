"""Sampling from a teacher alone against sampling with a draft model beside it (`SpeculativeSampler`).

    python -m benchmarks.drafting --teacher DIR --draft DIR [--batches 1,8,48] [--tokens 1,2,4] [--temperatures 0,0.8]
    [--top-p 0.95] [--deepen 90] [--prune 18] [--repeats 3]

Both sides answer the same prompts in turns, in one process; the figures are medians over the repeats. With one thread
(OMP_NUM_THREADS=1) seconds are those of the processor, so that other work on the machine counts for little.

`--prune` takes the first blocks of the draft model alone: a draft that never learned its part. `--deepen` puts blocks
that change nothing behind the teacher's own, which stands for a large teacher with the same distribution: what a round
costs then is measured, what a large teacher says is not. Greedy answers of both sides are compared.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.models.loading import load_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.prompts.sources import load_prompts
from limbeck.prompts.templates import encode_prompts
from limbeck.sampling.acceptance import AcceptanceStats
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.types import Response, Sampling, TokenPrompt


def deepened(model: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """The same function with so many more blocks, whose outputs are zero."""
    layers: Any = model.get_decoder().layers
    for _ in range(blocks):
        block = copy.deepcopy(layers[-1])
        block.self_attn.layer_idx = len(layers)
        with torch.no_grad():
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        layers.append(block)
    model.config.num_hidden_layers = len(layers)
    return model


def pruned(model: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """The first blocks alone."""
    decoder: Any = model.get_decoder()
    decoder.layers = decoder.layers[:blocks]
    model.config.num_hidden_layers = blocks
    return model


def timed(
    sampler: LocalSampler | SpeculativeSampler, prompts: Sequence[TokenPrompt], sampling: Sampling
) -> tuple[list[Response], float]:
    """The responses and how many tokens a second they took."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    responses = sampler.respond(prompts, sampling)
    return responses, sum(len(r.response_ids) for r in responses) / (clock() - begin)


def compare(
    alone: LocalSampler, drafted: SpeculativeSampler, prompts: Sequence[TokenPrompt], sampling: Sampling, repeats: int
) -> None:
    rates: list[tuple[float, float]] = []
    tally, tokens, same, answers = AcceptanceStats(), 0, 0, 0
    for seed in range(repeats):
        settings = replace(sampling, seed=seed)
        expected, rate = timed(alone, prompts, settings)
        responses, drafted_rate = timed(drafted, prompts, settings)
        rates.append((rate, drafted_rate))
        tally.add(drafted.tally.taken())
        tokens += sum(len(r.response_ids) for r in responses)
        same += sum(a.response_ids == b.response_ids for a, b in zip(expected, responses, strict=True))
        answers += len(prompts)
    before, after = (statistics.median(side) for side in zip(*rates, strict=True))
    ratio = statistics.median(b / a for a, b in rates)
    greedy = f", {same} of {answers} answers the same" if sampling.temperature == 0 else ""
    print(
        f"batch {alone.batch_size:3d}, T={sampling.temperature}, {drafted.draft_tokens} drafted: "
        f"alone {before:6.1f}, drafted {after:6.1f} tokens/s, ratio {ratio:.2f}; "
        f"acceptance {tally.acceptance:.3f}, {tokens / tally.rounds:.2f} tokens a round{greedy}",
        flush=True,
    )


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens per second of sampling, with and without a draft model.")
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--draft", default="smollm2-135m-instruct")
    parser.add_argument("--prune", type=int)
    parser.add_argument("--deepen", type=int, default=0)
    parser.add_argument("--batches", type=numbers, default=[1, 8, 48])
    parser.add_argument("--tokens", type=numbers, default=[4])
    parser.add_argument("--temperatures", type=numbers, default=[0.0, 0.8])
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    loaded, draft = load_model(options.teacher), load_model(options.draft).model
    tokenizer, teacher = loaded.tokenizer, deepened(loaded.model, options.deepen)
    draft = pruned(draft, options.prune) if options.prune else draft
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    alone = LocalSampler(
        model=teacher, eos_token_ids=(eos,), pad_token_id=eos, vocab_size=real_vocab_size(tokenizer), author="teacher"
    )
    every = encode_prompts(load_prompts("builtin", heldout_fraction=0.1).prompts, tokenizer)
    print(
        f"teacher {teacher.num_parameters() / 1e6:.0f} M parameters, draft {draft.num_parameters() / 1e6:.0f} M, "
        f"float32, {torch.get_num_threads()} threads, {options.new_tokens} new tokens, top_p={options.top_p}"
    )
    for batch in map(int, options.batches):
        # A few rows are over too soon to be timed: four batches of them.
        prompts = every[: batch if batch > 8 else 4 * batch]
        for temperature in options.temperatures:
            sampling = Sampling(max_new_tokens=options.new_tokens, temperature=temperature, top_p=options.top_p)
            for count in map(int, options.tokens):
                drafted = SpeculativeSampler(
                    model=teacher,
                    draft=draft,
                    eos_token_ids=(eos,),
                    pad_token_id=eos,
                    vocab_size=alone.vocab_size,
                    draft_tokens=count,
                    batch_size=batch,
                )
                compare(replace(alone, batch_size=batch), drafted, prompts, sampling, options.repeats)


if __name__ == "__main__":
    main()
