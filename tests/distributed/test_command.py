"""The whole command under a launcher: rank 0 plays the story, both ranks train, one of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny_pair import TinyPair

ROOT = Path(__file__).resolve().parents[2]


def play(*command: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_train_the_student_of_one(tmp_path: Path) -> None:
    recipe = TinyPair.write(tmp_path).recipe(tmp_path / "tiny")
    steps = ("train.max_steps=4", "evaluate.groups=[fidelity]")
    one, two = tmp_path / "one", tmp_path / "two"
    limbeck = (sys.executable, "-m", "limbeck", "run", str(recipe))
    play(*limbeck, *steps, f"output_dir={one}", "train.per_device_train_batch_size=4")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "limbeck")
    play(*launcher, "run", str(recipe), *steps, f"output_dir={two}", "train.per_device_train_batch_size=2")
    alone, beside = (load_file(folder / "student" / "model.safetensors") for folder in (one, two))
    assert alone.keys() == beside.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(beside[name], tensor, rtol=0, atol=1e-5)
    assert (one / "metrics.jsonl").read_text().count("\n") == (two / "metrics.jsonl").read_text().count("\n") == 4
    assert (two / "report.html").exists()
