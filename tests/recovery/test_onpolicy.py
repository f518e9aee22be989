"""kill -9 and Ctrl-C while the student writes its own lessons: no batch of a round is written twice."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.limbeck_command import CommandServer, KillAt
from tests.recovery.conftest import Reference, Sampled, measured
from tests.tiny_pair import TinyPair

# A first stage, then 12 steps: two epochs of five pairs of steps, and the beginning of a third. What the rule measures
# in the first epoch is used in the others.
PAIRS: dict[str, dict[str, Any]] = {
    "responses": {"source": "pairs"},
    "objective": {"name": "skl"},
    "contrast": {"student": {"name": "srkl"}, "beta": "code", "rule": {"name": "adaptive_alpha"}},
    "sft": {"num_train_epochs": 1.0},
    "train": {"per_device_train_batch_size": 8},
}
# As in test_kill.
MOMENTS = (
    # The teacher, before training.
    ("responses/batches/00002.jsonl", 0),
    # The first stage.
    ("metrics.sft.jsonl", 1),
    ("checkpoints/sft/step-000002", 0),
    ("checkpoints/sft/done", 0),
    # The first round, whose weights are those of the first stage; the teacher's part of it was there before.
    ("rounds/000/student/00000.jsonl", 0),
    ("rounds/000/student/00003.jsonl", 0),
    # Inside the epoch; then between two rounds, before and after their checkpoint.
    ("metrics.jsonl", 1),
    ("checkpoints/step-000004", 0),
    ("checkpoints/step-000005", 0),
    ("rounds/001/teacher/00001.jsonl", 0),
    ("rounds/001/teacher/.00004.jsonl.partial", 0),
    ("rounds/001/student/00000.jsonl", 0),
    ("rounds/001/student/00002.jsonl", 0),
    ("rounds/examples.jsonl", 1),
    ("checkpoints/step-000008", 0),
    # The checkpoint that is due anyway serves the round.
    ("checkpoints/step-000010", 0),
    ("rounds/002/teacher/00004.jsonl", 0),
    ("rounds/002/student/00001.jsonl", 0),
    ("student", 0),
    ("scores/after.fidelity.jsonl", 0),
    ("report.html", 0),
)


@pytest.fixture(scope="module")
def pairs(limbeck: CommandServer, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run with pairs that nothing interrupts."""
    root = tmp_path_factory.mktemp("pairs") / "run"
    started = time.monotonic()
    finished = limbeck.run("run", tiny.recipe(root, **PAIRS))
    assert finished.code == 0, finished.stderr
    assert [len(list(root.glob(f"rounds/{n:03d}/*/*.jsonl"))) for n in range(4)] == [5, 10, 10, 0]
    return Reference(root, time.monotonic() - started)


def test_one_moment_after_another(limbeck: CommandServer, tiny: TinyPair, pairs: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe, sampled = tiny.recipe(run, **PAIRS), Sampled(run)
    for name, before in MOMENTS:
        killed = limbeck.run("run", recipe, killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed)
        sampled.look()
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    sampled.look()
    pairs.check(run)
    again = limbeck.run("run", recipe)
    assert again.code == 0
    assert [line for line in again.stderr.splitlines() if "done earlier" not in line] == []


def test_killed_over_and_over_while_rounds_are_written(
    limbeck: CommandServer, tiny: TinyPair, pairs: Reference, tmp_path: Path
) -> None:
    """Each time the machine dies a few files further: what is there stands, and the run comes to its end."""
    run = tmp_path / "run"
    recipe, sampled = tiny.recipe(run, **PAIRS), Sampled(run)
    codes = [-signal.SIGKILL]
    while codes[-1] != 0:
        finished = limbeck.run("run", recipe, killed=KillAt(run, "rounds/*", writes=31))
        sampled.look()
        assert finished.code in (-signal.SIGKILL, 0), finished.stderr
        codes.append(finished.code)
        assert len(codes) < 30
    assert len(codes) > 4
    pairs.check(run)


@pytest.mark.parametrize("author", ["teacher", "student"])
def test_interrupted_in_a_round(
    limbeck: CommandServer, tiny: TinyPair, pairs: Reference, tmp_path: Path, author: str
) -> None:
    """The batch is finished, and the same command goes on with the next one."""
    run = tmp_path / "run"
    recipe, sampled = tiny.recipe(run, **PAIRS), Sampled(run)
    folder = run / "rounds" / "001" / author
    moment = KillAt(run, f"rounds/001/{author}/00001.jsonl", number=signal.SIGINT)
    stopped = limbeck.run("run", recipe, killed=moment)
    assert stopped.code == 128 + signal.SIGINT, stopped.stderr
    assert stopped.stdout == "" and "Traceback" not in stopped.stderr
    assert f"train: stopped while {author} responses of round 1 were written" in stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "stopped; what is finished is on disk, and the same command continues"
    assert sorted(path.name for path in folder.glob("*.jsonl")) == ["00000.jsonl", "00001.jsonl"]
    assert not json.loads((run / "stages" / "train.json").read_text())["done"]
    sampled.look()
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    # The answers of the two batches that are there.
    said = [line for line in finished.stderr.splitlines() if line.startswith(f"write: {author}")]
    assert said[0] == f"write: {author}, 12 of 18 answers"
    sampled.look()
    pairs.check(run)


AUTHORS: dict[str, dict[str, Any]] = {
    # Anew in every step, with answers that may grow.
    "student": {"source": {"name": "student", "first_max_new_tokens": 3}},
    # Rounds that end inside epochs, and steps of the teacher's among them.
    "mixed": {"source": {"name": "mixed", "share": 0.4, "share_end": 1.0, "refresh": 4}},
    # The share grows at every epoch; the buffer is full after two steps of the student's.
    "replay": {"source": {"name": "replay", "share": 0.5, "capacity": 8, "tolerance": 0.0, "bump": 0.25}},
}


@pytest.mark.parametrize("author", AUTHORS)
def test_other_authors(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, author: str) -> None:
    """What a supply remembers is in the checkpoint; what it draws depends on the step alone."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    # A rate so high that the held-out loss grows.
    train = {"learning_rate": 0.1, "lr_scheduler_type": "constant"}
    sections = {"responses": AUTHORS[author], "train": train, "student": {"layers": None, "keep": [0, 2]}}
    assert limbeck.run("train", tiny.recipe(whole, **sections)).code == 0
    recipe, sampled = tiny.recipe(run, **sections), Sampled(run)
    for name, before in (("checkpoints/step-000004", 0), ("metrics.jsonl", 5)):
        killed = limbeck.run("train", recipe, killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed)
        sampled.look()
    finished = limbeck.run("train", recipe)
    assert finished.code == 0, finished.stderr
    sampled.look()
    lines = measured(run)
    assert lines == measured(whole)
    assert (run / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()
    assert (run / "rounds/examples.jsonl").read_bytes() == (whole / "rounds/examples.jsonl").read_bytes()
    states = [json.loads((r / "checkpoints/step-000010/state.json").read_text()) for r in (run, whole)]
    for state in states:
        del state["seconds"], state["check"]
    assert states[0] == states[1]
    if author == "replay":
        # The test would be none if the buffer were never drawn from, or the share never moved.
        assert states[0]["response_source"]["phi"] > 0.5 and len(states[0]["response_source"]["buffer"]) == 8
        assert lines[3]["buffer"] == 8 and any(line.get("responses/count") for line in lines[4:])
    if author == "mixed":
        wrote = [bool(line.get("responses/count")) for line in lines]
        assert any(wrote) and not all(wrote)
