"""A head sharded by FSDP2 over two processes (gloo): gathered once a call, its gradient scattered once and averaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_processes_with_fully_shard(tmp_path):
    processes = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.objectives.sharded_worker", str(tmp_path)],
                cwd=ROOT,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text("utf-8"))
        assert found["weight is sharded"] and found["gradient is sharded"]
        # One gather of the head, one scatter of its gradient, in each of the two calls; the bias likewise.
        assert found["gathers"] == 4 and found["scatters"] == 4
        assert found["weight error"] < 1e-12 and found["bias error"] < 1e-12 and found["hidden error"] < 1e-12
        assert found["sharded teacher error"] < 1e-12
