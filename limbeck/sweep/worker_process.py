"""A process that does one run of a sweep after another, so that imports and torch's start are paid once.

    python -m limbeck.sweep.worker_process ARTIFACTS THREADS

Tasks come in and outcomes go out as JSON lines. When its input ends, as with the process that
started it, the worker ends in the middle of its work. Nothing finished is lost by that, as by kill -9.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from limbeck.sweep.tasks import Task, perform

ALIVE = "workers"
STOPPING = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    artifacts, threads = Path(sys.argv[1]), int(sys.argv[2])
    # Libraries print what they like; the pipe is for outcomes.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tasks: SimpleQueue[Task] = SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    # Both end it in order from here on, also between two runs; earlier ones were blocked by the process that started
    # this.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        import torch

        importlib.import_module("limbeck.pipeline.stage_order")
        torch.set_num_threads(threads)
        # After each run garbage is looked for, but not among what was imported.
        gc.freeze()
        # Held as long as the worker lives: another sweep waits until those of a killed one are gone.
        with (artifacts / f"{ALIVE}.lock").open("a") as alive:
            fcntl.flock(alive, fcntl.LOCK_SH)
            while True:
                outcome = perform(tasks.get())
                answers.write(json.dumps(asdict(outcome)) + "\n")
                answers.flush()
    except KeyboardInterrupt:
        os._exit(130)


def _listen(tasks: SimpleQueue[Task]) -> None:
    for line in sys.stdin:
        tasks.put(Task(**json.loads(line)))
    os._exit(0)


if __name__ == "__main__":
    main()
