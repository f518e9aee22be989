"""The command on one rank, with little patience; it may die by kill -9 just before it changes a file.

RANK=0 WORLD_SIZE=2 ... python -m tests.distributed.alone LIMIT_S ROOT NAME run RECIPE ...
"""

from __future__ import annotations

import runpy
import signal
import sys

from limbeck.runtime import heartbeat
from tests.limbeck_command import signalled_at

if __name__ == "__main__":
    limit_s, root, name, *command = sys.argv[1:]
    heartbeat.LIMIT_S, heartbeat.INTERVAL_S = float(limit_s), float(limit_s) / 8
    if name:
        signalled_at(root, name, 0, signal.SIGKILL)
    sys.argv = ["limbeck", *command]
    runpy.run_module("limbeck", run_name="__main__", alter_sys=True)
