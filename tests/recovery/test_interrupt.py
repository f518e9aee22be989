"""Ctrl-C and SIGTERM: the write is finished, one line says how to continue, and the same command does."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer
from tests.recovery.conftest import Reference, Sampled, catch
from tests.tiny_pair import TinyPair


def sampling(run: Path) -> bool:
    return (run / "responses/batches/00000.jsonl").exists()


def training(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0


def evaluating(run: Path) -> bool:
    return any((run / "scores/answers").glob("before-*"))


@pytest.mark.parametrize(
    ("moment", "stage", "number"),
    [
        (sampling, "respond", signal.SIGINT),
        (training, "train", signal.SIGINT),
        (evaluating, "evaluate", signal.SIGINT),
        (training, "train", signal.SIGTERM),
        (training, "train", signal.SIGHUP),
        (sampling, "respond", signal.SIGUSR1),
    ],
)
def test_interrupted(
    limbeck: CommandServer,
    tiny: TinyPair,
    reference: Reference,
    tmp_path: Path,
    moment: Callable[[Path], bool],
    stage: str,
    number: signal.Signals,
) -> None:
    command, run = catch(lambda run: limbeck.start("run", tiny.recipe(run)), tmp_path, moment)
    command.send(number)
    stopped = command.wait()
    assert stopped.code == 128 + number, stopped.stderr
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[-1] == "stopped; what is finished is on disk, and the same command continues"
    assert "Traceback" not in stopped.stderr
    record = json.loads((run / "stages" / f"{stage}.json").read_text())
    assert not record["done"] and record["seconds"] > 0
    if stage == "train":
        steps = len((run / "metrics.jsonl").read_text().splitlines())
        # The step that was being made is finished and kept, whatever save_steps says.
        assert (run / "checkpoints" / f"step-{steps:06d}").is_dir()
        assert f"train: stopped after step {steps} of 12" in stopped.stderr
    sampled = Sampled(run)
    sampled.look()
    finished = limbeck.run("run", run)
    assert finished.code == 0, finished.stderr
    sampled.look()
    reference.check(run)
    again = json.loads((run / "stages" / f"{stage}.json").read_text())
    assert again["done"] and again["seconds"] > record["seconds"] and again["started"] == record["started"]


def test_twice_stops_at_once(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    """The second Ctrl-C does not wait for the step."""
    train = {"max_steps": 2000, "num_train_epochs": 1000.0}
    command, run = catch(lambda run: limbeck.start("train", tiny.recipe(run, train=train)), tmp_path, training)
    command.send(signal.SIGINT)
    command.send(signal.SIGINT)
    assert command.wait().code == 130
    assert not (run / "student").exists()
