"""Runs of a sweep that commands start: the same bits, side by side, killed, and commands that fail."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from limbeck.sweep.sending import CommandPool, discard_sent
from limbeck.sweep.settings import load_sweep
from limbeck.sweep.tasks import Outcome, Task
from limbeck.sweep.template import words_of
from limbeck.types import LimbeckError
from tests.limbeck_command import ROOT, CommandServer
from tests.sweep.conftest import Play, made_here, read_lines, recipe_tree, require_same_bits
from tests.tiny_pair import TinyPair, write_recipe

ARMS = {"a": {"objective.name": "fkl"}, "b": {"objective.name": "rkl"}}
COMMAND = ["/opt/my python", "-m", "limbeck.sweep.sent_process", "/x/seed=0.task.json"]


def scheduler(folder: Path, body: str = 'exec "$@"\n') -> Path:
    """A program that notes the arm and the process that it starts, and starts it."""
    path = folder / "submit"
    path.write_text(f'#!/bin/sh\necho "$1" >> {folder / "sent"}\nexport OMP_NUM_THREADS=1\narm=$1\nshift\n{body}')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("srun --gres=gpu:1 {command}", ["srun", "--gres=gpu:1", *COMMAND]),
        ("env X={arm} {command} '{run}'", ["env", "X=a", *COMMAND, "/r"]),
        (
            'sbatch --wait --wrap "{command}"',
            ["sbatch", "--wait", "--wrap", "'/opt/my python' -m limbeck.sweep.sent_process /x/seed=0.task.json"],
        ),
        ("sh -c 'awk {{x}} ; {command} ; true'", None),
    ],
)
def test_words(template: str, words: list[str] | None) -> None:
    found = words_of(template, COMMAND, {"run": "/r", "arm": "a"})
    text = "awk {x} ; '/opt/my python' -m limbeck.sweep.sent_process /x/seed=0.task.json ; true"
    assert found == (words or ["sh", "-c", text])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("srun --gpus=1", "which starts no run; put {command}"),
        ("srun {comand}", "did you mean {command}?"),
        ("srun {gpu} {command}", "expected {command}, {run}, {arm}; double the braces"),
        ("srun '{command}", "No closing quotation"),
        ("srun {command", "expected '}'"),
    ],
)
def test_templates_that_start_nothing(template: str, said: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        load_sweep({"recipe": "quickstart", "command": template})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_program_that_is_not_there(played: Play, tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match="no program 'srunn' on PATH"):
        played(tmp_path / "s", arms=ARMS, command="srunn {command}")
    assert not (tmp_path / "s" / "arms").exists()


def test_two_at_a_time_have_the_bits_of_runs_in_this_process(played: Play, tiny: TinyPair, tmp_path: Path) -> None:
    submit = scheduler(tmp_path)
    sent = played(tmp_path / "sent-away", arms=ARMS, command=f"{submit} {{arm}} {{command}}", parallel=2)
    assert (sent.end.failed, sent.end.lost, sent.end.exit_code) == (0, 0, 0)
    assert sorted((tmp_path / "sent").read_text().split()) == ["a", "b"]
    here = played(tmp_path / "here", arms=ARMS)
    runs = [sent.root / "arms" / arm / "seed=0" for arm in ARMS]
    for arm, run in zip(ARMS, runs, strict=True):
        require_same_bits(run, here.root / "arms" / arm / "seed=0")
        assert "evaluate" in run.with_name("seed=0.log").read_text()
    # The teacher's work is done by one of them.
    assert sorted("respond" in made_here(run) for run in runs) == [False, True]
    assert not list(sent.root.rglob("*.task.json")) and not list(sent.root.rglob("*.outcome.json"))

    again = played(tmp_path / "sent-away", arms=ARMS, command=f"{submit} {{arm}} {{command}}", parallel=2)
    assert again.end.exit_code == 0 and len((tmp_path / "sent").read_text().split()) == 2


def test_a_command_that_fails(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    submit = scheduler(tmp_path, 'if [ "$arm" = a ]; then echo no such partition; exit 3; fi\nexec "$@"\n')
    root = tmp_path / "s"
    tree = {"recipe": recipe_tree(tiny), "output_dir": str(root), "arms": ARMS}
    path = write_recipe(tmp_path / "s.yaml", tree | {"command": f"{submit} {{arm}} {{command}}"})
    finished = limbeck.run("sweep", path, env={"PYTHONPATH": str(ROOT)})
    assert finished.code == 2, finished.stderr
    log = root / "arms" / "a" / "seed=0.log"
    reason = f"its command ended with exit code 3; {log} may say why"
    assert f"a, seed 0: failed: {reason} (1 of 2 runs" in finished.stderr
    assert "1 of the failed runs had a command that failed; start the sweep again" in finished.stderr
    assert [(line["state"], line["error"]) for line in read_lines(root)] == [("failed", reason), ("done", None)]
    assert log.read_text() == "no such partition\n"


def task_of(tiny: TinyPair, root: Path) -> Task:
    tree = recipe_tree(tiny) | {"output_dir": str(root / "arms" / "a" / "seed=0"), "name": "s/a"}
    return Task(recipe=tree, artifacts=str(root / "shared"), update=False, arm="a")


def test_a_command_that_does_not_wait(tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.sweep.sending.SEEN_S", 0.1)
    outcomes: list[Outcome] = []
    pool = CommandPool(template="true {command}", count=1)
    pool.run([task_of(tiny, tmp_path)], lambda _: None, lambda _, outcome: outcomes.append(outcome))
    (outcome,) = outcomes
    assert outcome.lost and "exit code 0 before its run had ended (sbatch needs --wait)" in (outcome.error or "")


def test_what_was_sent_does_nothing_once_it_is_discarded(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that waits in a queue while its sweep is killed, and begins after another one."""
    monkeypatch.setattr("limbeck.sweep.sending.SEEN_S", 0.1)
    outcomes: list[Outcome] = []
    pool = CommandPool(template="sh -c 'sleep 1; true {command}'", count=1)
    arguments = ([task_of(tiny, tmp_path)], lambda _: None, lambda _, outcome: outcomes.append(outcome))
    sweep = threading.Thread(target=pool.run, args=arguments)
    sweep.start()
    folder = tmp_path / "arms" / "a"
    while not (found := list(folder.glob("*.task.json"))):
        time.sleep(0.01)
    discard_sent(tmp_path)
    command = [sys.executable, "-m", "limbeck.sweep.sent_process", str(found[0])]
    late = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    sweep.join()
    assert late.returncode == 1 and "the sweep that sent this run has ended" in late.stderr
    assert not (folder / "seed=0").exists() and outcomes[0].lost


def test_a_sweep_that_is_killed_sends_nothing_twice(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    submit, root = scheduler(tmp_path), tmp_path / "s"
    tree = {"recipe": recipe_tree(tiny), "output_dir": str(root), "arms": ARMS, "parallel": 2}
    path = write_recipe(tmp_path / "s.yaml", tree | {"command": f"{submit} {{arm}} {{command}}"})
    environment = {"PYTHONPATH": str(ROOT)}
    command = limbeck.start("sweep", path, env=environment)
    # Each log begins once its process holds the lock that another sweep waits for.
    logs = [root / "arms" / arm / "seed=0.log" for arm in ARMS]
    assert command.wait_until(lambda: all(log.exists() and log.stat().st_size for log in logs))
    command.kill()
    finished = limbeck.run("sweep", path, env=environment)
    assert finished.code == 0, finished.stderr
    assert sorted((tmp_path / "sent").read_text().split()) == ["a", "b"]
    assert [line["state"] for line in read_lines(root)] == ["done", "done"]
