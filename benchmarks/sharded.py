"""Shipped recipes on one process, on two under DDP, on two and four with a sharded student: how far these are apart.

    python -m benchmarks.sharded                     # writes docs/results/sharded.md; goes on after a stop
    python -m benchmarks.sharded --only kd,gkd --out DIR --page FILE

Each recipe trains as it is shipped, but for a tiny pair of random models, twenty-four prompts of its own kind, four
steps and a fixed learning rate (`vision` in float32): what is compared is the update. The gap is the largest
difference between two weights of the students, in float32 and, of one launch, in float64. What a rank keeps is
counted in bytes, of the weights that are trained, their gradients and the optimizer's state, after the first update
of the last stage, and given as a share of what one process keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from limbeck.models import loading
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.files import shipped_recipes
from limbeck.recipe.load import load_recipe
from limbeck.runtime.files import write_text
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair, questions, write_model
from tests.tiny_vision import write_questions, write_vision_model

ROOT = Path(__file__).resolve().parents[1]
# Each process has its share of a step.
STEP_ROWS = 8
LAUNCHES = {
    "one": (1, "none"),
    "ddp": (2, "none"),
    "sharded": (2, "full"),
    "four": (4, "full"),
    "one64": (1, "none"),
    "sharded64": (2, "full"),
}
# What each is compared with; those with 64 hold every float32 of both models in float64.
ALONE = {"ddp": "one", "sharded": "one", "four": "one", "sharded64": "one64"}
PROMPTS = {
    "sdft": "context",
    "math": "gsm8k",
    "opsd": "gsm8k",
    "code": "mbpp",
    "pretrain": "text",
}
# Both models of such a recipe read images.
SEES = "vision"


def names() -> list[str]:
    """The recipes for general use; those of papers and of the laboratory are these with other settings."""
    return [name for name in shipped_recipes() if "/" not in name]


def changes(name: str, pair: Path, run: Path, processes: int, sharding: str) -> list[str]:
    """What a recipe is changed in."""
    shipped = load_recipe(name)
    made = {
        "output_dir": str(run),
        "prompts.source": str(pair / f"{PROMPTS.get(name, 'plain')}.jsonl"),
        "prompts.eval_fraction": 0.25,
        "prompts.limit": None,
        "prompts.dataset_config": None,
        "responses.max_new_tokens": 12,
        "responses.batch_size": 4,
        "train.max_steps": 4,
        "train.warmup_steps": 1,
        "train.warmup_ratio": 0.0,
        "train.learning_rate": 1e-4,
        "train.per_device_train_batch_size": STEP_ROWS // processes,
        "train.gradient_accumulation_steps": 1,
        "train.compile": "off",
        "train.sharding": sharding,
    }
    if shipped.preference is not None:
        # One process tunes on preferences, after the training that is compared.
        made |= {"preference": None, "evaluate.groups": ["fidelity"]}
    if shipped.responses.verify is not None:
        # No answer of random models is right.
        made["responses.verify"] = None
    if shipped.student.init == "depth_prune":
        made["student.layers"] = 2
    if shipped.student.model is not None:
        made["student.model"] = str(pair / "teacher")
    if shipped.teacher.model not in ("base", "ema", "live"):
        made["teacher.model"] = str(pair / "teacher")
    if name == SEES:
        folder = pair / SEES
        made |= {"prompts.source": str(folder / "questions.jsonl"), "teacher.model": str(folder / "teacher")}
        made |= {"student.model": str(folder / "student"), "teacher.dtype": "float32", "train.bf16": False}
    return [f"{key}={json.dumps(value)}" for key, value in made.items()]


def train(name: str, pair: Path, out: Path, launch: str) -> None:
    """Train one recipe in this process, as a rank of its launch, and write down what happened."""
    processes, sharding = LAUNCHES[launch]
    rank, run = int(os.environ.get("RANK", "0")), out / launch / name
    found: dict[str, Any] = {}
    kept: list[int] = []
    if launch.endswith("64"):
        loading.DTYPES["float32"] = torch.float64
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: kept.append(bytes_of(optimizer)))
    began = time.monotonic()
    try:
        run_pipeline(load_recipe(name, changes(name, pair, run, processes, sharding)), stages=STAGES, until="train")
    except LimbeckError as error:
        found["refused"] = str(error)
    hook.remove()
    found |= {"bytes": kept[-1] if kept else None, "seconds": round(time.monotonic() - began, 1)}
    write_text(out / launch / f"{name}.{rank}.json", json.dumps(found))


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and moments in this process."""
    held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    held += [p.grad for p in held if p.grad is not None]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in held]
    return sum(part.numel() * part.element_size() for part in parts)


def write_pair(folder: Path) -> None:
    """The pair, and prompts of each kind that a recipe asks for."""
    TinyPair.write(folder)
    # Some teachers see longer prompts.
    write_model(folder / "teacher", window=512)
    asked = questions()
    rows: dict[str, list[dict[str, Any]]] = {
        "plain": [{"prompt": text, "completion": text[::-1]} for text in asked],
        "context": [{"prompt": text, "privileged_context": text.upper()} for text in asked],
        "text": [{"text": " ".join([text] * 3)} for text in asked],
        "gsm8k": [{"question": text, "answer": f"#### {i}"} for i, text in enumerate(asked)],
        "mbpp": [
            {
                "task_id": i,
                "text": text,
                "code": f"def f():\n    return {i}",
                "test_list": [f"assert f() == {i}"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for i, text in enumerate(asked)
        ],
    }
    write_vision_model(folder / SEES / "teacher", "qwen2_vl", seed=1)
    write_vision_model(folder / SEES / "student", "qwen2_vl", seed=2, patch=16, layers=1)
    write_questions(folder / SEES, 24)
    for name, lines in rows.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def launched(out: Path, launch: str, todo: list[str]) -> None:
    """Run a launch on some recipes, one after another in the same processes."""
    processes = LAUNCHES[launch][0]
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["benchmarks.sharded", "--launch", launch, "--out", str(out), "--only", ",".join(todo)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=False)


def said(out: Path, launch: str, name: str) -> dict[str, Any] | None:
    """What the first rank of a launch wrote down of a recipe; None where it has not."""
    path = out / launch / f"{name}.0.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def gap(out: Path, launch: str, name: str) -> float | None:
    """The largest difference between two weights of the students of a launch and of one process."""
    files = [out / which / name / "student" / "model.safetensors" for which in (ALONE[launch], launch)]
    if not all(path.exists() for path in files):
        return None
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


def row(out: Path, name: str) -> str:
    """The row of a recipe in the table."""
    cells = [f"`{name}`"]
    for launch in ALONE:
        found, apart = said(out, launch, name), gap(out, launch, name)
        if found is not None and "refused" in found:
            cells.append("refused")
        else:
            cells.append("not run" if apart is None else f"{apart:.1e}")
    one, *shards = (said(out, launch, name) for launch in ("one", "sharded", "four"))
    for found in shards:
        both = one and found and one["bytes"] and found["bytes"]
        cells.append(f"{both / one['bytes']:.1%}" if one and both else "")
    return "| " + " | ".join(cells) + " |"


HEAD = """| recipe | gap, DDP | gap, sharded over 2 | over 4 | over 2, in float64 | kept by one of 2 | of 4 |
|---|---|---|---|---|---|---|"""
START, END = "<!-- rows -->", "<!-- end of rows -->"


def write_page(out: Path, page: Path, chosen: list[str]) -> None:
    """Put the table into the page, between its two marks."""
    rows = "\n".join(row(out, name) for name in chosen)
    before, _, rest = page.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    write_text(page, f"{before}{START}\n\n{HEAD}\n{rows}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="recipes, with commas; all of them without it")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sharded")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "sharded.md")
    parser.add_argument("--launch", choices=LAUNCHES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else names()
    pair = options.out / "pair"
    if options.launch:
        for name in chosen:
            train(name, pair, options.out, options.launch)
        return
    if not pair.exists():
        write_pair(pair)
    for launch in LAUNCHES:
        if todo := [name for name in chosen if said(options.out, launch, name) is None]:
            launched(options.out, launch, todo)
    write_page(options.out, options.page, chosen)


if __name__ == "__main__":
    main()
