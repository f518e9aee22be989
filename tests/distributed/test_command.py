"""The whole command under a launcher: rank 0 plays the story, both ranks train, one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.recovery.conftest import Sampled
from tests.tiny_pair import TinyPair

ROOT = Path(__file__).resolve().parents[2]


LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


def ended(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def play(*command: str) -> list[str]:
    """Lines of what it says, with those of other libraries."""
    done = ended(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr.splitlines()


def test_two_ranks_train_the_student_of_one(tmp_path: Path) -> None:
    recipe = TinyPair.write(tmp_path).recipe(tmp_path / "tiny")
    steps = ("train.max_steps=4", "evaluate.groups=[fidelity]")
    one, two = tmp_path / "one", tmp_path / "two"
    limbeck = (sys.executable, "-m", "limbeck", "run", str(recipe))
    play(*limbeck, *steps, f"output_dir={one}", "train.per_device_train_batch_size=4")
    batch = "train.per_device_train_batch_size=2"
    said = play(*LAUNCHER, "limbeck", "run", str(recipe), *steps, f"output_dir={two}", batch)
    step = "4 responses per step (2 per device x 1 accumulated x 2 ranks)"
    first = f"launch: 2 ranks, wrapper DDP, started by torchrun; {step}"
    assert next(line for line in said if line.startswith(("launch:", "prompts:"))) == first
    assert json.loads((two / "provenance.json").read_text())["launch"]["effective_batch"] == 4
    alone, beside = (load_file(folder / "student" / "model.safetensors") for folder in (one, two))
    assert alone.keys() == beside.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(beside[name], tensor, rtol=0, atol=1e-5)
    assert (one / "metrics.jsonl").read_text().count("\n") == (two / "metrics.jsonl").read_text().count("\n") == 4
    assert (two / "report.html").exists()


def test_a_rank_that_dies_while_it_writes_ends_the_launch_and_the_next_one_continues(tmp_path: Path) -> None:
    """The first rank waits for the other's batches of the round: it must not wait for ever."""
    run = tmp_path / "run"
    recipe = TinyPair.write(tmp_path).recipe(
        run,
        responses={"source": "pairs"},
        sft={"num_train_epochs": 0.5},
        train={"max_steps": 6, "per_device_train_batch_size": 4},
        evaluate={"groups": ["fidelity"]},
    )
    died = ended(*LAUNCHER, "tests.distributed.dying", str(run), "rounds/001/student/00003.jsonl", "run", str(recipe))
    assert died.returncode != 0 and "Signal 9 (SIGKILL)" in died.stderr, died.stderr[-3000:]
    sampled = Sampled(run)
    sampled.look()
    assert run / "rounds" / "001" / "student" / "00001.jsonl" in sampled.seen
    assert [path.name for path in run.glob("checkpoints/step-000005")] and not (run / "student").exists()
    play(*LAUNCHER, "limbeck", "run", str(recipe))
    sampled.look()
    assert len(list(run.glob("rounds/001/*/*.jsonl"))) == 10
    assert (run / "metrics.jsonl").read_text().count("\n") == 6
    assert (run / "report.html").exists()
