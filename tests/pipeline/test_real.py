"""The quickstart's own models end to end, with few prompts and steps: real weights, real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

KEEP = [0, 1, 2, 6, 7, 8, 9, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29]


@pytest.mark.real
def test_quickstart_in_small(smollm2_dir: Path, tmp_path: Path) -> None:
    assert smollm2_dir.is_dir()
    run = tmp_path / "run"
    command = [sys.executable, "-m", "limbeck", "run", "quickstart", f"output_dir={run}"]
    changes = [
        "student.layers=null", f"student.keep={KEEP}", "prompts.limit=30", "prompts.eval_fraction=0.2",
        "responses.max_new_tokens=12", "train.max_steps=8", "train.warmup_steps=0", "train.compile=off",
        # The search takes as long as all the rest; the whole quickstart, which follows the tests, has it.
        "train.learning_rate=1e-4",
        "evaluate.max_new_tokens=6", "evaluate.prompts=2",
    ]  # fmt: skip
    done = subprocess.run([*command, *changes], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(run / "report.html")

    scores = json.loads((run / "scores.json").read_text("utf-8"))
    before, after = (scores[part]["forward_kl"]["mean"] for part in ("before", "after"))
    assert after < before, "eight steps already bring the student nearer to its teacher"
    student: Any = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32)
    assert student.config.num_hidden_layers == len(KEEP)
    assert (
        sum(p.numel() for p in student.parameters())
        == json.loads((run / "student/student.json").read_text())["parameters"]
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert student.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3
    # What a stage wrote is not written again: the same command only looks.
    stamps = {path: path.stat().st_mtime_ns for path in (run / "responses").rglob("*.jsonl")}
    again = subprocess.run([*command, *changes], capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0 and again.stderr.count("done earlier") >= 5, again.stderr
    assert stamps == {path: path.stat().st_mtime_ns for path in (run / "responses").rglob("*.jsonl")}
