"""A run whose next micro-batch is read in a thread: beside a damaged file, a kill, a disk that hangs.

A CPU prepares nothing ahead: the processes are told to do as for a CUDA device, with a copy in place of pinned memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.limbeck_command import ROOT, CommandServer
from tests.recovery.conftest import Reference
from tests.tiny_pair import TinyPair

# What happens in the thread when it has prepared so many micro-batches.
AHEAD = """
import os, runpy, signal, sys, time
from pathlib import Path
from limbeck.training import micro_batches

event, count, run = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def damage():
    for shard in run.glob("signal/0*.safetensors"):
        with shard.open("r+b") as file:
            size = shard.stat().st_size
            file.seek(size // 2)
            file.write(bytes(size // 4))

def hang():
    (run / "hangs").touch()
    time.sleep(600)

def pin(tensor):
    prepare.count += 1
    if prepare.count == count:
        EVENTS[event]()
    return tensor.clone()

EVENTS = {"damage": damage, "hang": hang, "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}

def prepare(device):
    return pin

prepare.count = 0
micro_batches.pin_of = prepare
sys.argv[1:] = sys.argv[4:]
runpy.run_module("limbeck", run_name="__main__")
"""
# Tensors that are pinned of a micro-batch: six of the batch and the hidden states.
OF_A_BATCH = 7


def started(event: str, batches: int, run: Path, *args: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", AHEAD, event, str(OF_A_BATCH * batches), str(run), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_damaged_shard_is_one_line(tiny: TinyPair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started("damage", 4, run, "run", tiny.recipe(run))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in said, said
    assert "is not what was written" in said.splitlines()[-1]


def test_a_kill_while_it_reads_loses_nothing(
    limbeck: CommandServer, tiny: TinyPair, reference: Reference, tmp_path: Path
) -> None:
    """The run goes on without reading ahead, and ends as one that never did."""
    run = tmp_path / "run"
    process = started("kill", 7, run, "run", tiny.recipe(run))
    _, said = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, said
    assert (run / "metrics.jsonl").exists()
    assert limbeck.run("run", run).code == 0
    reference.check(run)


def test_ctrl_c_does_not_wait_for_a_disk_that_hangs(tiny: TinyPair, tmp_path: Path) -> None:
    """The first asks the step to end, which waits for what it reads; the second ends the process."""
    run = tmp_path / "run"
    process = started("hang", 4, run, "run", tiny.recipe(run))
    deadline = time.monotonic() + 300
    while not (run / "hangs").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
