"""Quantisation recovery: SmolLM2-135M in 4 bits, healed against its own full precision.

    python -m benchmarks.recovery --teach dolly/train-00.jsonl --heal dolly/train-01.jsonl --wikitext test.jsonl

The embedded SmolLM2 comes out of a 4-bit file, so its own weights lie near a 4-bit grid and would flatter rounding.
"Full precision" is therefore a copy that is first taught in float32 on answers of Dolly. Then, for each seed, the
recipe `recover` quantises that copy and distils it from itself on other prompts of Dolly; llama.cpp's own quantiser,
without and with an importance matrix, stands beside it: the run measures it as it measures the student. Perplexity on
WikiText-2 is of windows that follow each other. The same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import run
from limbeck.evaluation.quantised import round_by_llama_cpp
from limbeck.evaluation.scores.metrics import with_stand_in
from limbeck.export import export_model
from limbeck.models.loading import load_model, load_tokenizer
from limbeck.models.quantization.files import read_blocks
from limbeck.models.quantization.importance import importance_of
from limbeck.ops import onednn
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import read_json, write_json, write_text

WINDOW = 512
CALIBRATION = 64
ROWS = {
    "forward_kl": "held-out forward KL to full precision, nats per token",
    "reverse_kl": "held-out reverse KL",
    "top1_agreement": "top-1 agreement",
    "rouge_l": "ROUGE-L beside full precision's greedy answers",
    "accuracy@gsm8k": "share of GSM8K's problems that are solved",
    "wikitext": "WikiText-2 perplexity",
    "size": "weights, MB",
}
SIDES = ("full precision", "llama.cpp", "llama.cpp, importance matrix", "before training", "healed")


def short_rows(chosen: argparse.Namespace, source: Path) -> Path:
    """The rows of Dolly whose prompt is of `--longest` characters at most: a few of thousands take most of the time."""
    out = chosen.out / f"{source.stem}-of-{chosen.longest}-characters.jsonl"
    if not out.exists():
        rows = source.read_text("utf-8").splitlines()
        prompts = [json.loads(row) for row in rows]
        kept = [r for r, p in zip(rows, prompts, strict=True) if len(p["instruction"] + p["context"]) <= chosen.longest]
        write_text(out, "\n".join(kept) + "\n")
    return out


def taught(chosen: argparse.Namespace) -> Path:
    """The copy that counts as full precision: cross-entropy on answers of the data, in float32."""
    recipe = {
        "name": "taught",
        "output_dir": str(chosen.out / "taught"),
        "teacher": {"model": chosen.model, "cache": False},
        "student": {"init": "pretrained", "model": chosen.model},
        "prompts": {
            "source": str(short_rows(chosen, chosen.teach)),
            "limit": 8 * chosen.teach_steps,
            "too_long": "drop",
        },
        "responses": {"source": "data", "max_new_tokens": chosen.new_tokens},
        "objective": {"name": "ce"},
        "train": {
            "max_steps": chosen.teach_steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-4,
            "warmup_steps": max(1, chosen.teach_steps // 20),
            "compile": chosen.compile,
            "save_total_limit": 1,
        },
        "evaluate": {"groups": ["nll"]},
    }
    return run(recipe).student


def healed(chosen: argparse.Namespace, teacher: Path, seed: int) -> Path:
    """The run directory of a seed."""
    groups: dict[str, Any] = {"fidelity": {}, "rouge": {}, "recovery": {"baselines": ["llama_cpp", "imatrix"]}}
    if chosen.gsm8k is not None:
        groups["tasks"] = {"files": {"gsm8k": str(chosen.gsm8k)}, "limit": chosen.problems, "teacher": True}
    recipe = {
        "name": f"recovery-{seed}",
        "output_dir": str(chosen.out / f"seed-{seed}"),
        "teacher": {"model": str(teacher)},
        "student": {
            "init": "teacher",
            "quantize": {"format": chosen.format, "fallback": chosen.fallback, "grid": chosen.grid},
        },
        "prompts": {"source": str(short_rows(chosen, chosen.heal)), "limit": chosen.prompts, "too_long": "drop"},
        "responses": {"source": "teacher", "max_new_tokens": chosen.new_tokens, "seed": seed},
        "objective": {"name": chosen.objective},
        "train": {
            "max_steps": chosen.steps,
            "per_device_train_batch_size": 4,
            "learning_rate": chosen.rate,
            "warmup_steps": max(1, chosen.steps // 20),
            "compile": chosen.compile,
            "save_total_limit": 1,
            "seed": seed,
        },
        "evaluate": {"groups": groups, "max_new_tokens": chosen.new_tokens},
    }
    return run(recipe).student.parent


@torch.inference_mode()
def perplexity(model: Any, ids: Sequence[int]) -> float:
    """exp of the mean cross-entropy per token over windows that follow each other; the first token of each is given."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor([list(ids[start : start + WINDOW])])
        if window.shape[1] < 2:
            continue
        with onednn.linears():
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return math.exp(total / count)


def wikitext_ids(chosen: argparse.Namespace, tokenizer: Any) -> list[int]:
    lines = [json.loads(line)["text"] for line in chosen.wikitext.read_text("utf-8").splitlines()]
    return list(tokenizer("\n".join(lines))["input_ids"])[: chosen.windows * WINDOW]


def perplexities(chosen: argparse.Namespace, teacher: Path, directory: Path) -> dict[str, float]:
    """Of each side; what is on disk is not measured again."""
    path = directory / "wikitext.json"
    found: dict[str, float] = read_json(path) if path.exists() else {}
    blocks = read_blocks(directory / "student")
    assert blocks is not None
    responses = read_responses(directory / "responses/teacher.jsonl")[:CALIBRATION]
    ids = wikitext_ids(chosen, load_tokenizer(teacher))

    def by_llama_cpp(*, weighted: bool) -> nn.Module:
        model: nn.Module = load_model(teacher).model
        batches = (collate({0: response}, (0,), pad_id=0) for response in responses)
        importance = importance_of(model, batches, device=torch.device("cpu")) if weighted else None
        round_by_llama_cpp(model, blocks.formats, importance)
        return model

    made = {
        SIDES[0]: lambda: load_model(teacher).model,
        SIDES[1]: partial(by_llama_cpp, weighted=False),
        SIDES[2]: partial(by_llama_cpp, weighted=True),
        SIDES[3]: lambda: load_model(rounded(chosen, teacher)).model,
        SIDES[4]: lambda: load_model(directory / "student").model,
    }
    if chosen.grid != "nearest":
        del made[SIDES[3]]  # The start of such a student is not on disk by itself.
    for side, make in made.items():
        if side not in found:
            found[side] = perplexity(make().eval(), ids)
            write_json(path, found)
    return found


def rounded(chosen: argparse.Namespace, teacher: Path) -> Path:
    """The GGUF file of full precision, rounded to nearest by limbeck."""
    out = chosen.out / f"rounded-{chosen.format}"
    if not out.exists():
        export_model(str(teacher), out, format="gguf", dtype=chosen.format)
    return next(out.glob("*.gguf"))


def measured(chosen: argparse.Namespace, teacher: Path, seed: int) -> dict[str, dict[str, float]]:
    """Every row of a seed by side, and the shares that came back."""
    directory = healed(chosen, teacher, seed)
    if not (out := chosen.out / f"seed-{seed}-gguf").exists():
        # It compares every weight of the file with what was trained, bit for bit.
        export_model(str(directory), out, format="gguf")
    scores: Any = read_json(directory / "scores.json")
    before, after = ({n: s["mean"] for n, s in scores[part].items()} for part in ("before", "after"))
    rows: dict[str, dict[str, float]] = {}
    full = {"forward_kl": 0.0, "reverse_kl": 0.0, "top1_agreement": 1.0, "rouge_l": 1.0}
    if chosen.gsm8k is not None:
        full["accuracy@gsm8k"] = after["teacher_accuracy@gsm8k"]
    for name, value in full.items():
        bare, _, condition = name.partition("@")
        by_llama_cpp = (after[f"{bare}@{with_stand_in(condition, one)}"] for one in ("llama_cpp", "imatrix"))
        rows[name] = dict(zip(SIDES, (value, *by_llama_cpp, before[name], after[name]), strict=True))
    rows["wikitext"] = perplexities(chosen, teacher, directory)
    sizes = (after["teacher_shipped_size@file"], *[after["shipped_size@file"]] * 4)
    rows["size"] = dict(zip(SIDES, sizes, strict=True))
    shares = (after["recovered@llama_cpp"], after["recovered@imatrix"], after["recovered"])
    rows["recovered"] = dict(zip(SIDES[1:4], shares, strict=True))
    return rows


def table(found: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """The rows, means over the seeds with the lowest and highest."""

    def cell(row: str, side: str) -> str:
        values = [rows[row][side] for rows in found if side in rows[row]]
        if not values:
            return ""
        spread = f" ({min(values):.3g} to {max(values):.3g})" if max(values) > min(values) else ""
        return f"{statistics.mean(values):.4g}{spread}"

    lines = [f"| | {' | '.join(SIDES)} |", f"|---|{'---:|' * len(SIDES)}"]
    told = ((row, said) for row, said in ROWS.items() if row in found[0])
    lines += [f"| {said} | {' | '.join(cell(row, side) for side in SIDES)} |" for row, said in told]
    back = " | ".join(cell("recovered", side) for side in SIDES[1:4])
    return "\n".join([*lines, f"| share of that side's forward KL that training brought back | | {back} | |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teach", type=Path, required=True, help="rows of Dolly that full precision is taught on")
    parser.add_argument("--heal", type=Path, required=True, help="other rows, whose prompts the student is healed on")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2's test part, JSONL with a field text")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--format", default="q4_0")
    parser.add_argument("--fallback", help="as student.quantize.fallback")
    parser.add_argument("--grid", choices=("nearest", "importance"), default="importance", help="student.quantize.grid")
    parser.add_argument("--objective", default="fkl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teach-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=1600)
    parser.add_argument("--longest", type=int, default=400, help="characters of a prompt; rows above are left out")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gsm8k", type=Path, help="problems of GSM8K, JSONL, to be solved by each side")
    parser.add_argument("--problems", type=int, help="at most so many of them")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--compile", default="auto")
    chosen = parser.parse_args()
    teacher = taught(chosen)
    found = []
    for seed in chosen.seeds:
        found.append(measured(chosen, teacher, seed))
        write_json(chosen.out / "measured.json", found)
        write_text(chosen.out / "table.md", table(found))
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
