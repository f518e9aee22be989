"""What two processes have done, once for all tests that look at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.tiny_pair import write_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder in which two processes have played every scenario of worker.py, once for all workers of the tests."""
    if worker_id == "master":
        return _play(tmp_path_factory.mktemp("two"))
    folder = tmp_path_factory.getbasetemp().parent / "two"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "played").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _play(folder)
            (folder / "played").touch()
    return folder


def _play(folder: Path) -> Path:
    write_model(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.distributed.worker", str(folder)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    try:
        ends = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(end[-3000:] for end in ends)
    return folder
