"""The command on a rank of a launch, one of which (DIES, the second) dies by kill -9 just before it changes a file.

python -m torch.distributed.run ... -m tests.distributed.dying ROOT NAME run RECIPE ...
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from tests.limbeck_command import signalled_at

if __name__ == "__main__":
    root, name, *command = sys.argv[1:]
    if os.environ["RANK"] == os.environ.get("DIES", "1"):
        signalled_at(root, name, 0, signal.SIGKILL)
    sys.argv = ["limbeck", *command]
    runpy.run_module("limbeck", run_name="__main__", alter_sys=True)
