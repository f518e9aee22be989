"""A training whose teacher is behind a server and whose signal is on disk a few steps at a time: the next steps scored
beside those that are trained, and before them.

    python -m benchmarks.windows --answers dolly/train-02.jsonl --out DIR

SmolLM2-135M-Instruct scores on one core, in a process with the interface of vLLM, one response at a time; ten fresh
blocks of its shape learn from its twenty likeliest tokens on the other. The limit of the disk is the same both ways, so
that the windows that wait are twice as long.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.teachers.served import ServedTeacher

MODEL, ROWS, STEPS, LIMIT = "smollm2-135m-instruct", 170, 32, 465 * 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="JSONL with instruction and response")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    write_rows(asked.answers, asked.out / "rows.jsonl")
    address = asked.out / "address"
    address.unlink(missing_ok=True)
    code = f"from benchmarks.windows import serve; serve({str(address)!r})"
    server = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not address.exists():
            if server.poll() is not None:
                raise SystemExit(f"the server has ended with exit code {server.returncode}; its reason is above")
            time.sleep(0.1)
        print("| the teacher scores the next steps | s, training in all | s, its steps alone |\n|---|---:|---:|")
        for way, elsewhere in (("before them", False), ("beside the steps before", True)):
            seconds, steps = trained(asked.out, address.read_text("utf-8"), elsewhere)
            print(f"| {way} | {seconds:.0f} | {steps:.0f} |", flush=True)
    finally:
        server.kill()


def write_rows(answers: Path, rows: Path) -> None:
    """Prompts without context and answers of middle length."""
    found = []
    for line in answers.read_text("utf-8").splitlines():
        row = json.loads(line)
        if 150 < len(row["response"]) < 350 and len(row["instruction"]) < 200 and not row.get("context"):
            found.append(json.dumps({"prompt": row["instruction"], "completion": row["response"]}) + "\n")
    rows.write_text("".join(found[:ROWS]), "utf-8")


def trained(out: Path, url: str, elsewhere: bool) -> tuple[float, float]:
    """Seconds of the stage train, and of the steps in it."""
    run = out / ("beside" if elsewhere else "before")
    shutil.rmtree(run, ignore_errors=True)
    ServedTeacher.elsewhere = property(lambda _: elsewhere)  # type: ignore[method-assign, assignment]
    where = {"name": "server", "base_url": url, "concurrency": 1}
    tree: dict[str, Any] = {
        "output_dir": str(run),
        "teacher": {
            "model": MODEL,
            "support": "topk_tail",
            "support_k": 20,
            "cache_limit_gib": LIMIT / 2**30,
            "where": where,
        },
        "student": {"init": "scratch", "model": MODEL, "config": {"num_hidden_layers": 10}},
        "prompts": {"source": str(out / "rows.jsonl"), "eval_fraction": 0.05},
        "responses": {"source": "data", "max_new_tokens": 96},
        "objective": {"name": "fkl", "temperature": 1.0},
        "train": {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "compile": "off"},
        "evaluate": {"groups": {"nll": {"whose": "references"}}},
    }
    run_pipeline(load_recipe(tree), stages=[stage for stage in STAGES if stage.name not in ("evaluate", "report")])
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    return json.loads((run / "stages" / "train.json").read_text("utf-8"))["seconds"], last["seconds"]


def serve(address: str) -> None:
    """Score with the teacher until the process is killed, one response at a time."""
    import torch
    from tokenizers import Tokenizer

    from limbeck.models.assets import fetch
    from limbeck.models.loading import load_model
    from tests.teachers.scoring_server import scoring_server

    model, one = load_model(MODEL).model, threading.Lock()

    def scores(ids: list[int]) -> torch.Tensor:
        with one, torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    tokenizer = Tokenizer.from_file(str(fetch(MODEL) / "tokenizer.json"))
    with scoring_server(tokenizer, scores) as (_, url, _):
        partial = Path(f"{address}.partial")
        partial.write_text(url, "utf-8")
        partial.rename(address)
        threading.Event().wait()


if __name__ == "__main__":
    main()
