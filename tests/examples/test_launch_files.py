"""The files of examples/launch/: what limbeck prints, and commands that were run on two addresses of this machine."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.launch_files import FOLDER, launch_files
from limbeck.models.devices import DEVICES, Fleet
from limbeck.models.launchers import LAUNCHERS, PORT, Job
from tests.distributed.test_launches import own_lines
from tests.limbeck_command import ROOT
from tests.tiny_pair import TinyPair

HOSTS = ("127.0.0.1", "127.0.0.2")
# Notes what a rank was started with, in the place of limbeck.
SHIM = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "PET_LOCAL_ADDR", "ACCELERATE_USE_FSDP", "FSDP_VERSION")
rank = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}
open(os.path.join(os.environ["NOTED"], os.environ["RANK"] + ".json"), "w").write(json.dumps(rank))
"""
SRUN = """#!/bin/bash
node=0
for host in 127.0.0.1 127.0.0.2; do
  SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=2 PET_LOCAL_ADDR=$host "$@" & tasks="$tasks $!"
  node=$((node + 1))
done
for task in $tasks; do wait $task || exit 1; done
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[1-2]" ] || exit 9
printf '127.0.0.1\\n127.0.0.2\\n'
"""


def test_files_are_what_limbeck_prints() -> None:
    texts = launch_files()
    there = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir() if path.name != "README.md"}
    assert there == texts, "examples/launch is not current: run `python -m benchmarks.launch_files`"
    assert len(texts) == 1 + len(LAUNCHERS)
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in readme for name in texts)
    for name in ("torchrun.sh", "slurm.sh", "vllm.sh"):
        subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def two_nodes(arguments: tuple[str, ...], *, sharded: bool = False) -> Job:
    """A job on two nodes of one processor each."""
    node = replace(DEVICES.build("cpu"), host=False)
    return Job(name="tiny", arguments=arguments, fleet=Fleet(name="cpu", count=2, device=node), sharded=sharded)


def text_of(launcher: str, job: Job) -> str:
    """What is printed for a job, with a port that is free here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return LAUNCHERS.build(launcher).text(job).replace(str(PORT), str(port))


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment(**more: str) -> dict[str, str]:
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": programs}
    return os.environ | common | {"PYTHONPATH": str(ROOT)} | more


def on_each(commands: list[list[str]], environments: list[dict[str, str]], folder: Path) -> list[str]:
    """What all hosts say on standard error; all must end well."""
    hosts = [
        subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, env in zip(commands, environments, strict=True)
    ]
    try:
        said = [host.communicate(timeout=300)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0] * len(hosts), "\n".join(text[-2000:] for text in said)
    return said


def test_torchrun_on_two_hosts(tiny: TinyPair, tmp_path: Path) -> None:
    """The printed command on each of two addresses, in a folder that both see."""
    run = tmp_path / "run"
    sections = {"train": {"max_steps": 2, "per_device_train_batch_size": 2}, "evaluate": {"groups": ["fidelity"]}}
    recipe = str(tiny.recipe(run, **sections))
    text = text_of("torchrun", two_nodes((recipe,)))
    environments = [environment(FIRST_NODE=HOSTS[0], PET_LOCAL_ADDR=host) for host in HOSTS]
    said = on_each([["bash", "-c", text]] * 2, environments, tmp_path)
    launch = "launch: 2 ranks, wrapper DDP, started by torchrun; 4 responses per step"
    assert sum(launch in text for text in said) == 1 and not any(own_lines(text) for text in said)
    record = json.loads((run / "provenance.json").read_text())["launch"]
    assert (record["ranks"], record["launcher"]) == (2, "torchrun") and (run / "report.html").exists()


def shimmed(tmp_path: Path) -> dict[str, str]:
    """An environment in which `-m limbeck` notes how it was started."""
    program(tmp_path / "shim" / "limbeck.py", SHIM)
    return environment(PYTHONPATH=str(tmp_path / "shim"), NOTED=str(tmp_path))


def require_two_ranks(folder: Path, arguments: tuple[str, ...], **more: str) -> None:
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(rank["RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [("0", "2"), ("1", "2")]
    assert all(rank["arguments"] == ["run", *arguments] for rank in ranks)
    assert all(rank[name] == value for rank in ranks for name, value in more.items())


def test_slurm_starts_both_tasks(tmp_path: Path) -> None:
    arguments = ("my recipe.yaml", "objective={name: js, beta: 0.5}")
    program(tmp_path / "bin" / "srun", SRUN)
    program(tmp_path / "bin" / "scontrol", SCONTROL)
    program(tmp_path / "job.sh", text_of("slurm", two_nodes(arguments)))
    shim = shimmed(tmp_path)
    given = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "PATH": f"{tmp_path / 'bin'}:{shim['PATH']}"}
    on_each([["bash", str(tmp_path / "job.sh")]], [shim | given], tmp_path)
    require_two_ranks(tmp_path, arguments)
    hosts = {json.loads((tmp_path / f"{rank}.json").read_text())["PET_LOCAL_ADDR"] for rank in range(2)}
    assert hosts == set(HOSTS)


def test_skypilot_starts_both_nodes(tmp_path: Path) -> None:
    arguments = ("my recipe.yaml", "train.max_steps=4")
    task = yaml.safe_load(text_of("skypilot", two_nodes(arguments)))
    given = {"SKYPILOT_NODE_IPS": "\n".join(HOSTS), "SKYPILOT_TASK_ID": "sky-7", "SKYPILOT_NUM_NODES": "2"}
    environments = [shimmed(tmp_path) | given | {"PET_LOCAL_ADDR": host} for host in HOSTS]
    on_each([["bash", "-c", task["run"]]] * task["num_nodes"], environments, tmp_path)
    require_two_ranks(tmp_path, arguments)


@pytest.mark.parametrize("sharded", [False, True])
def test_accelerate_starts_both_nodes(tmp_path: Path, sharded: bool) -> None:
    """The command of the file's second line, with the file itself as configuration."""
    arguments = ("my recipe.yaml", "train.max_steps=4")
    text = text_of("accelerate", two_nodes(arguments, sharded=sharded))
    (tmp_path / "accelerate.yaml").write_text(text, "utf-8")
    command = text.splitlines()[1].removeprefix("# ")
    environments = [shimmed(tmp_path) | {"FIRST_NODE": HOSTS[0], "NODE": str(node)} for node in range(2)]
    on_each([["bash", "-c", command]] * 2, environments, tmp_path)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    require_two_ranks(tmp_path, arguments, **asked)
