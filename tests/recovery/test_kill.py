"""kill -9 at any moment, then the same command: it continues, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.limbeck_command import ROOT, CommandServer, KillAt
from tests.recovery.conftest import Reference, Sampled, losses
from tests.tiny_pair import TinyPair, write_model

# Files in the order in which a run makes them, each with how often it was made before. The kill comes just before the
# file gets its name: what it should hold is on disk under another one, or not at all.
MOMENTS = (
    ("recipe.resolved.yaml", 0),
    ("prompts.jsonl", 0),
    ("stages/prompts.json", 1),
    ("stages/respond.json", 0),
    ("responses/batches/00000.safetensors", 0),
    ("responses/batches/00000.jsonl", 0),
    ("responses/batches/00002.jsonl", 0),
    ("responses/teacher.jsonl", 0),
    ("stages/respond.json", 1),
    ("signal/hidden.safetensors", 0),
    ("signal/000003.safetensors", 0),
    ("signal/000003.json", 0),
    ("blocks.json", 0),
    ("metrics.jsonl", 1),
    ("checkpoints/step-000002", 0),
    ("checkpoints/.step-000004.partial/state.json", 0),
    ("checkpoints/step-000006", 0),
    # Old checkpoints are being removed.
    ("checkpoints/step-*", 3),
    ("checkpoints/step-000010", 0),
    ("student", 0),
    ("student/student.json", 0),
    ("stages/train.json", 1),
    ("scores/before.fidelity.jsonl", 0),
    ("scores/answers/after-*/00000.jsonl", 0),
    ("scores/answers/after-*.jsonl", 0),
    ("scores/after.rouge.jsonl", 0),
    ("scores/after.rouge.json", 0),
    ("scores.json", 0),
    ("samples.jsonl", 0),
    ("student/README.md", 0),
    ("report.html", 0),
    ("stages/report.json", 1),
)


def test_one_moment_after_another(limbeck: CommandServer, tiny: TinyPair, reference: Reference, tmp_path: Path) -> None:
    """One run, killed before each of its files gets its name."""
    run = tmp_path / "run"
    recipe, sampled = tiny.recipe(run), Sampled(run)
    for name, before in MOMENTS:
        killed = limbeck.run("run", recipe, killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed)
        sampled.look()
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    sampled.look()
    reference.check(run)


def test_every_so_many_writes(limbeck: CommandServer, tiny: TinyPair, reference: Reference, tmp_path: Path) -> None:
    """Killed at changes of the directory that nobody chose, further in each time."""
    run = tmp_path / "run"
    recipe, sampled = tiny.recipe(run), Sampled(run)
    codes = [-signal.SIGKILL]
    while codes[-1] != 0:
        finished = limbeck.run("run", recipe, killed=KillAt(run, writes=17 + 3 * len(codes)))
        sampled.look()
        assert finished.code in (-signal.SIGKILL, 0), finished.stderr
        codes.append(finished.code)
        assert len(codes) < 40
    assert len(codes) > 5
    reference.check(run)


@pytest.mark.parametrize("share", [0.2, 0.45, 0.6, 0.85])
def test_at_any_time(
    limbeck: CommandServer, tiny: TinyPair, reference: Reference, tmp_path: Path, share: float
) -> None:
    """By the clock, in the middle of a computation as well as of a write."""
    run = tmp_path / "run"
    recipe, sampled = tiny.recipe(run), Sampled(run)
    command = limbeck.start("run", recipe)
    time.sleep(share * reference.seconds)
    command.kill()
    sampled.look()
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    sampled.look()
    reference.check(run)


def test_again_and_again(limbeck: CommandServer, tiny: TinyPair, reference: Reference, tmp_path: Path) -> None:
    """A machine that takes the run away every moment: it still comes to its end."""
    run = tmp_path / "run"
    recipe, sampled = tiny.recipe(run), Sampled(run)
    codes = [-signal.SIGKILL]
    while codes[-1] != 0:
        # A little longer each time: the reference may have been slowed down by whatever else ran beside it.
        deadline = time.monotonic() + reference.seconds * (0.05 + 0.04 * len(codes))
        command = limbeck.start("run", recipe)
        while not command.ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        killed = command.kill()
        sampled.look()
        assert killed.code in (-signal.SIGKILL, 0), killed.stderr
        codes.append(killed.code)
        assert len(codes) < 60
    assert len(codes) > 2
    reference.check(run)


def test_the_installed_command(limbeck: CommandServer, tiny: TinyPair, reference: Reference, tmp_path: Path) -> None:
    """The same without the tests' server between: a fresh interpreter, killed while it trains."""
    run = tmp_path / "run"
    recipe = tiny.recipe(run)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "limbeck", "run", str(recipe)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        while next(run.glob("checkpoints/step-*"), None) is None and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert limbeck.run("run", recipe).code == 0
    reference.check(run)


def test_adapters_with_dropout(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    """Dropout draws random numbers in every step: their generator's state is part of a checkpoint."""
    student = write_model(tmp_path / "student", layers=2, seed=3)
    section = {"model": str(student), "init": "pretrained", "layers": None, "lora": {"r": 4, "lora_dropout": 0.5}}
    train = {"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert limbeck.run("train", tiny.recipe(whole, student=section, train=train)).code == 0
    recipe = tiny.recipe(run, student=section, train=train)
    killed = limbeck.run("train", recipe, killed=KillAt(run, "checkpoints/step-000004"))
    assert killed.code == -signal.SIGKILL
    assert limbeck.run("train", recipe).code == 0
    assert losses(run) == losses(whole)
    assert (run / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()
