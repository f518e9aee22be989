"""Launches that cannot do what they were asked for, for real: refused in one line, or given up in time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.runtime.heartbeat import LIMIT_S
from tests.distributed.test_command import LAUNCHER, ROOT, ended
from tests.limbeck_command import CommandServer, all_end
from tests.tiny_pair import TinyPair

ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_machines: 1
num_processes: 2
use_cpu: true
mixed_precision: 'no'
"""


def own_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("limbeck: ")]


@pytest.mark.parametrize("options", [("--cpu", "--num_processes", "2"), ("--config_file", "CONFIG")], ids=str)
def test_accelerate_starts_one_process_on_a_cpu_whatever_it_was_asked_for(
    options: tuple[str, ...], tiny: TinyPair, tmp_path: Path
) -> None:
    (tmp_path / "CONFIG").write_text(CONFIG)
    recipe, run = tiny.recipe(tmp_path / "run"), tmp_path / "run"
    told = [str(tmp_path / option) if option == "CONFIG" else option for option in options]
    end = ended(*ACCELERATE, *told, "-m", "limbeck", "run", str(recipe))
    [line] = own_lines(end.stderr)
    assert "accelerate launch was asked for 2 processes and has started 1" in line
    assert "`torchrun --nproc-per-node=2 -m limbeck run RECIPE`" in line and "exit status 2" in end.stderr
    assert end.returncode != 0 and not run.exists()


def test_accelerate_with_fsdp_is_refused_on_every_rank(tiny: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    recipe, config = tiny.recipe(tmp_path / "run"), str(tmp_path / "config.yaml")
    end = ended(*ACCELERATE, "--config_file", config, "--use_fsdp", "-m", "limbeck", "run", str(recipe))
    lines = own_lines(end.stderr)
    # The first to end may take the other one with it.
    assert 1 <= len(lines) <= 2 and all("asks for FSDP (ACCELERATE_USE_FSDP)" in line for line in lines)
    assert end.returncode != 0 and "exitcode  : 2" in end.stderr and not (tmp_path / "run").exists()


def test_accelerate_starts_ranks_that_know_of_each_other_where_it_is_told_so(tiny: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    recipe, config = tiny.recipe(tmp_path / "run", train={"max_steps": 2}), str(tmp_path / "config.yaml")
    end = ended(*ACCELERATE, "--config_file", config, "--multi_gpu", "-m", "limbeck", "train", str(recipe))
    assert end.returncode == 0, end.stderr[-3000:]
    launch = json.loads((tmp_path / "run" / "provenance.json").read_text())["launch"]
    assert (launch["ranks"], launch["wrapper"], launch["launcher"]) == (2, "DDP", "accelerate launch")


def test_fewer_ranks_than_a_checkpoint_was_made_with(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    """What the refusals say is so, and both remedies work."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    recipe = str(tiny.recipe(run, train={"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2}))
    dying = ("tests.distributed.dying", str(run), "checkpoints/.step-000004*", "train", recipe)
    died = ended(*LAUNCHER, *dying, DIES="0")
    assert died.returncode != 0 and (run / "checkpoints" / "step-000002").exists(), died.stderr[-3000:]
    shutil.copytree(run, copy)
    alone = ("train", recipe, f"output_dir={copy}")
    line = limbeck.run(*alone).error_line
    assert "was made with 4 responses per step and this launch has 2; launch 2 processes again, or delete" in line
    # A step of as many responses is the same training: see test_sharded.py.
    assert line.endswith("or give train.per_device_train_batch_size=4")
    other = limbeck.run(*alone, "train.per_device_train_batch_size=3").error_line
    assert "was made by another recipe: train.per_device_train_batch_size is 2 there and 3 here" in other
    assert f"or delete {copy / 'checkpoints'} to train from the start" in line
    shutil.rmtree(copy / "checkpoints")
    for ranks, folder in ((limbeck.launch("train", recipe), run), ([limbeck.start(*alone)], copy)):
        all_end(ranks)
        steps = [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6]


def two_ranks(runs: tuple[Path, Path], recipe: Path, dies_at: str) -> list[subprocess.CompletedProcess[str]]:
    """Both ranks without a launcher that would end one for the other; each gives up after 6 s without a sign."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank, run in enumerate(runs):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.distributed.alone", "6", str(run), dies_at if rank == 0 else ""]
        command += ["run", str(recipe), f"output_dir={run}"]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [
        subprocess.CompletedProcess(rank.args, rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["student.layers=99"], "student.layers is 99"),
        (["teacher.model=/nowhere"], "/nowhere"),
        (["train.max_stepz=1"], "train.max_stepz"),
        (["--updat"], "no such option"),
    ],
)
def test_what_is_refused_is_said_by_one_rank_and_all_end(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, changes: list[str], said: str
) -> None:
    recipe = str(tiny.recipe(tmp_path / "run"))
    began = time.monotonic()
    first, other = (rank.wait() for rank in limbeck.launch("run", recipe, *changes))
    assert first.code == other.code == 2 and said in first.error_line.lower()
    # And sooner than a rank misses the signs of another.
    assert not own_lines(other.stderr) and time.monotonic() - began < LIMIT_S


def test_a_rank_without_the_first_ones_directory_gives_up(tiny: TinyPair, tmp_path: Path) -> None:
    """Two machines, no shared disk: both end, and the first one too names the rank that does not come."""
    recipe = tiny.recipe(tmp_path / "run", train={"max_steps": 2})
    first, other = two_ranks((tmp_path / "here", tmp_path / "there"), recipe, dies_at="")
    [line] = own_lines(first.stderr)
    assert first.returncode == 2 and f"rank 0 has seen no sign of rank 1 in {tmp_path / 'here'} for 6 s" in line
    assert not (tmp_path / "there").exists() and "Traceback" not in first.stderr
    [line] = own_lines(other.stderr)
    assert other.returncode == 2 and f"rank 1 does not see rank 0 work in {tmp_path / 'there'}" in line
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("dies_at", "said"),
    [
        ("responses/*", "rank 1 has seen no sign of rank 0"),
        ("metrics.jsonl", "another rank of this launch has ended or cannot be reached"),
    ],
)
def test_a_rank_whose_first_one_died_gives_up(dies_at: str, said: str, tiny: TinyPair, tmp_path: Path) -> None:
    """While it waits for a file, and in the middle of a training step."""
    recipe = tiny.recipe(tmp_path / "run", train={"max_steps": 4})
    first, other = two_ranks((tmp_path / "run", tmp_path / "run"), recipe, dies_at)
    assert first.returncode == -9
    [line] = own_lines(other.stderr)
    assert "responses" in dies_at or "reached (no sign of rank 0)" in line
    assert other.returncode == 2 and said in line and "start the same command again" in line
    assert "Traceback" not in other.stderr
