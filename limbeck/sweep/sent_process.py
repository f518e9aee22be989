"""A process that does one run of a sweep, on any machine that has the sweep's folder under the same path.

    python -m limbeck.sweep.sent_process TASK

It ends with exit code 0 where the run is done or has paused, 1 where it has failed, 130 where it was stopped.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from limbeck.runtime.files import read_json, write_json
from limbeck.sweep.sending import outcome_of
from limbeck.sweep.tasks import Task, perform
from limbeck.sweep.worker_process import ALIVE

CODES = {"done": 0, "paused": 0, "failed": 1, "stopped": 130}


def main() -> None:
    path = Path(sys.argv[1])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("limbeck: a run of a sweep is one process; leave torchrun and accelerate out of sweep.command")
    if not path.exists():
        sys.exit(
            f"limbeck: no {path}: the sweep that sent this run has ended, or its folder is not here under the same path"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sent = read_json(path)
    task = Task(**sent["task"])
    os.chdir(sent["folder"])
    with _alive(Path(task.artifacts)):
        # The sweep may have ended while this process waited for its turn.
        if not path.exists():
            sys.exit(f"limbeck: no {path} any more: the sweep that sent this run has ended")
        outcome = perform(task)
        write_json(outcome_of(path), asdict(outcome))
    sys.exit(CODES[outcome.state])


@contextmanager
def _alive(artifacts: Path) -> Iterator[None]:
    """A block during which no other sweep begins in the same folder, where its file system has locks."""
    artifacts.mkdir(parents=True, exist_ok=True)
    with (artifacts / f"{ALIVE}.lock").open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


if __name__ == "__main__":
    main()
