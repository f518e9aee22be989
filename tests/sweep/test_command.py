"""The real command with workers side by side: killed, stopped, started twice; and a worker that dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from limbeck.recipe.load import as_tree, load_recipe
from limbeck.runtime.rundir import RunDirectory
from limbeck.sweep.tasks import Outcome, Task
from limbeck.sweep.workers import Workers
from tests.limbeck_command import CommandServer
from tests.sweep.conftest import Play, Tree, alone, made_here, read_lines, recipe_tree, require_same_bits
from tests.tiny_pair import TinyPair, write_recipe

# Long enough to be caught in the middle.
STEPS = {"max_steps": 60, "save_steps": 10, "num_train_epochs": 100.0}
ARMS = {"a": {"objective.name": "fkl"}, "b": {"objective.name": "rkl"}}


def sweep_file(tiny: TinyPair, root: Path, **keys: object) -> Path:
    tree: Tree = {"recipe": recipe_tree(tiny, train=STEPS), "output_dir": str(root), "parallel": 2, "arms": ARMS}
    return write_recipe(root.with_suffix(".yaml"), tree | keys)


def both_train(root: Path) -> bool:
    logs = [root / "arms" / arm / "seed=0" / "metrics.jsonl" for arm in ARMS]
    return all(log.exists() and log.stat().st_size > 0 for log in logs)


def workers_of(root: Path) -> list[int]:
    """Processes that play runs of a sweep."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            # It has ended meanwhile.
            continue
        if b"limbeck.sweep.worker_process" in words and os.fsencode(root / "shared") in words:
            found.append(int(entry.parent.name))
    return found


def gone(root: Path) -> bool:
    deadline = time.monotonic() + 20
    while workers_of(root) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not workers_of(root)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc to see which processes are left")
def test_killed_started_twice_stopped_and_continued(
    limbeck: CommandServer, tiny: TinyPair, played: Play, tmp_path: Path
) -> None:
    root = tmp_path / "s"
    path = sweep_file(tiny, root)
    command = limbeck.start("sweep", path)
    assert command.wait_until(lambda: both_train(root))
    assert [line["state"] for line in read_lines(root)] == ["running", "running"]
    second = limbeck.run("sweep", path)
    assert second.code == 2 and "is in use by another run" in second.error_line
    command.kill()
    assert gone(root)

    command = limbeck.start("sweep", path)
    assert command.wait_until(lambda: len(workers_of(root)) == 2 and (root / "workers.log").exists())
    assert command.wait_until(lambda: [line["state"] for line in read_lines(root)].count("running") == 2)
    command.send(signal.SIGINT)
    stopped = command.wait()
    assert stopped.code == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "stopped; what is finished is on disk, and the same command continues"
    assert "Traceback" not in stopped.stderr + (root / "workers.log").read_text()
    assert [line["state"] for line in read_lines(root)] == ["waiting", "waiting"]
    assert gone(root)

    finished = limbeck.run("sweep", root)
    assert finished.code == 0, finished.stderr
    assert finished.stdout == f"{root / 'compare.html'}\n" and (root / "compare.html").exists()
    assert [line["state"] for line in read_lines(root)] == ["done", "done"]
    runs = [root / "arms" / arm / "seed=0" for arm in ARMS]
    assert sorted("respond" in made_here(run) for run in runs) == [False, True]
    assert (RunDirectory(runs[0]).root / "superseded").exists() is False
    require_same_bits(runs[1], alone(tiny, tmp_path / "r", "objective.name=rkl", train=STEPS))


def test_exit_code_where_everything_fails(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    path = sweep_file(tiny, tmp_path / "s", arms={"a": {"train.learning_rate": 1e30}}, parallel=1)
    finished = limbeck.run("sweep", path)
    assert finished.code == 1 and "1 runs, 1 failed" in finished.stderr


def test_mistakes_are_one_line(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    path = sweep_file(tiny, tmp_path / "s")
    finished = limbeck.run("sweep", path, "sweep.parallell=2")
    assert finished.code == 2 and "did you mean 'parallel'?" in finished.error_line
    assert "is a sweep, not a recipe" in limbeck.run("run", path).error_line


def test_a_run_whose_worker_is_killed_once_goes_on(tiny: TinyPair, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_tree(tiny) | {"output_dir": str(tmp_path / "a")})
    task = Task(recipe=as_tree(recipe), artifacts=str(tmp_path / "shared"), update=False)
    outcomes: list[Outcome] = []
    workers = Workers(artifacts=tmp_path / "shared", count=1, threads=1, log=tmp_path / "workers.log")
    begun: list[int] = []

    def kill_the_first(number: int) -> None:
        begun.append(number)
        if len(begun) == 1:
            while not workers_of(tmp_path):
                time.sleep(0.01)
            os.kill(workers_of(tmp_path)[0], signal.SIGKILL)

    try:
        workers.run([task], kill_the_first, lambda _, outcome: outcomes.append(outcome))
    finally:
        workers.close()
    assert outcomes == [Outcome(state="done")] and begun == [0, 0]


def test_a_worker_that_is_killed(tiny: TinyPair, tmp_path: Path) -> None:
    """Again and again: its run has failed, the next one gets another worker."""
    recipes = [load_recipe(recipe_tree(tiny) | {"output_dir": str(tmp_path / name)}) for name in "ab"]
    tasks = [Task(recipe=as_tree(recipe), artifacts=str(tmp_path / "shared"), update=False) for recipe in recipes]
    outcomes: dict[int, Outcome] = {}
    workers = Workers(artifacts=tmp_path / "shared", count=1, threads=1, log=tmp_path / "workers.log")

    def begun(number: int) -> None:
        if number == 0:
            while not workers_of(tmp_path):
                time.sleep(0.01)
            os.kill(workers_of(tmp_path)[0], signal.SIGKILL)

    try:
        workers.run(tasks, begun, outcomes.__setitem__)
    finally:
        workers.close()
    assert outcomes[0].state == "failed" and "was killed, as systems do when memory runs out" in (
        outcomes[0].error or ""
    )
    assert outcomes[0].lost and outcomes[1] == Outcome(state="done")
    record = RunDirectory(tmp_path / "b").manifest("train")
    assert record is not None and record["done"]
