"""Where a pruned student begins: widths cut by importance or at random, and blocks cut, at one number of parameters.

    limbeck run kd                                     any run whose blocks were chosen by measurement
    python -m benchmarks.width --run runs/kd           writes docs/results/width.md

Nothing is trained. Each student is cut out of the run's teacher to the same number of parameters; forward KL to the
teacher is measured on the run's held-out answers. Importance is measured on its training answers, as a run does.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from limbeck.models.forward import hidden_states
from limbeck.models.heads import head_of, project
from limbeck.models.loading import load_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import write_text
from limbeck.student.blocks import depth_prune
from limbeck.student.width import Heads, WidthChoice, WidthSpec
from limbeck.student.width_importance import choose_width
from limbeck.student.width_pruning import width_prune
from limbeck.types import Response, TokenBatch

PAGE = Path(__file__).resolve().parents[1] / "docs/results/width.md"
SHARE, CALIBRATION, MEASURED, SEEDS = 0.8, 24, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    run: Path = parser.parse_args().run
    recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text("utf-8"))
    loaded = load_model(recipe["teacher"]["model"], dtype="float32")
    model, vocabulary = loaded.model, real_vocab_size(loaded.tokenizer)
    train, heldout = (_responses(run, split) for split in ("train", "heldout"))
    calibration = [collate(train[:CALIBRATION], range(len(train[:CALIBRATION])), pad_id=0)]
    probe = collate(heldout[:MEASURED], range(len(heldout[:MEASURED])), pad_id=0)
    expected_NV = _logp(model, probe, vocabulary)
    removed = json.loads((run / "blocks.json").read_text("utf-8"))["removed"]
    lines = []
    for name, kind, student in _students(model, calibration, removed):
        logq_NV = _logp(student, probe, vocabulary)
        kl = float((expected_NV.exp() * (expected_NV - logq_NV)).sum(-1).mean())
        count = sum(p.numel() for p in student.parameters())
        lines.append(f"| {name} | {kind} | {count / 1e6:.1f} M | {kl:.2f} |")
        print(lines[-1], flush=True)
    # What is said below the table stays.
    after = PAGE.read_text("utf-8").rpartition("|\n")[2] if PAGE.exists() else ""
    write_text(PAGE, _page(loaded.provenance.name, probe, lines) + after)


def _students(model: Any, calibration: Sequence[TokenBatch], removed: Sequence[int]) -> Iterator[tuple[str, str, Any]]:
    config, heads = model.config, Heads.of(model.config)
    depth, width, neurons = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    gone = round(depth * (1 - SHARE))
    yield (
        f"{depth - gone} of {depth} blocks",
        "greedy KL",
        depth_prune(model, sorted({*range(depth)} - {*removed[:gone]})),
    )
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    attention = block - 3 * width * neurons - 2 * width
    fewer = heads.together * round(heads.groups * 2 / 3)
    lean = int((SHARE * block - attention) / (3 * width))
    both = int((SHARE * block - attention * fewer / heads.count) / (3 * width))
    whole = sum(p.numel() for p in model.parameters())
    # All weights but the norms' have the hidden size once.
    thin = round(width * (whole - gone * block) / whole / heads.count) * heads.count
    for name, sizes in (
        (f"intermediate_size {neurons} to {lean}", WidthSpec(intermediate_size=lean)),
        (
            f"num_attention_heads {heads.count} to {fewer}, intermediate_size to {both}",
            WidthSpec(num_attention_heads=fewer, intermediate_size=both),
        ),
        (f"hidden_size {width} to {thin}", WidthSpec(hidden_size=thin)),
    ):
        choice = choose_width(model, calibration, sizes)
        yield name, "importance", width_prune(model, choice)
        if choice.hidden:
            plain = replace(choice, norm_factors=dict.fromkeys(choice.norm_factors, 1.0))
            yield name, "importance, norms left as they were", width_prune(model, plain)
        for seed in range(SEEDS):
            yield name, f"at random ({seed})", width_prune(model, _at_random(model, choice, seed))


def _at_random(model: Any, choice: WidthChoice, seed: int) -> WidthChoice:
    """As many of everything, drawn; the norms scaled for what is as likely to carry much as little."""
    draw, heads = random.Random(seed), Heads.of(model.config)

    def some(kept: Sequence[int], size: int) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(size), len(kept))))

    return replace(
        choice,
        hidden=some(choice.hidden, model.config.hidden_size),
        neurons=tuple(some(kept, model.config.intermediate_size) for kept in choice.neurons),
        groups=tuple(some(kept, heads.groups) for kept in choice.groups),
        norm_factors=dict.fromkeys(choice.norm_factors, 1.0),
    )


@torch.no_grad()
def _logp(model: Any, batch: TokenBatch, vocabulary: int) -> Tensor:
    return torch.log_softmax(project(head_of(model, vocabulary, verify=False), hidden_states(model, batch)), -1)


def _responses(run: Path, split: str) -> list[Response]:
    return [r for r in read_responses(run / "responses/teacher.jsonl") if r.split == split]


def _page(name: str, probe: TokenBatch, lines: Sequence[str]) -> str:
    return "\n".join(
        [
            "# Where a pruned student begins",
            "",
            f"`{name}`, cut to the same number of parameters and not trained. Forward KL to the whole model in",
            f"nats per token, on {len(probe.labels_N)} tokens of {MEASURED} held-out answers; importance is measured "
            f"on {CALIBRATION} training answers.",
            "",
            "    limbeck run kd",
            "    python -m benchmarks.width --run runs/kd",
            "",
            "| cut | chosen by | parameters | KL |",
            "|---|---|---:|---:|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
