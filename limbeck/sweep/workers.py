"""Workers that do the runs of a sweep: this process, or several side by side."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Protocol

from limbeck.runtime.interrupts import GracefulStop
from limbeck.sweep.tasks import Outcome, Task, perform
from limbeck.sweep.worker_process import STOPPING

Begun = Callable[[int], None]
Ended = Callable[[int, Outcome], None]
# Seconds between two looks at stop requests while workers are busy.
LOOK_S = 0.2


class WorkerPool(Protocol):
    def run(self, tasks: Sequence[Task], begun: Begun, ended: Ended) -> None:
        """Do the tasks, in order as far as they fit side by side, and call `begun` and `ended` for each.

        Raises:
            KeyboardInterrupt: stopped by a signal; the current runs have stopped in order.
        """
        ...


class InProcessPool:
    """One run after another, in this process."""

    def run(self, tasks: Sequence[Task], begun: Begun, ended: Ended) -> None:
        for number, task in enumerate(tasks):
            begun(number)
            outcome = perform(task)
            ended(number, outcome)
            if outcome.state == "stopped":
                raise KeyboardInterrupt(outcome.number)


@dataclass
class _Worker:
    """A process and the number of its task; None while it waits for one."""

    process: subprocess.Popen[str]
    task: int | None = None

    @property
    def outcomes(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def give(self, number: int, task: Task) -> None:
        assert self.process.stdin is not None
        self.task = number
        # Of a process that has died meanwhile the end is read where its outcome should be.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(asdict(task)) + "\n")
            self.process.stdin.flush()

    def close_stdin(self) -> None:
        """Close its input, on which it ends at once."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self) -> int:
        """Wait some seconds for its end and return its exit code."""
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.outcomes.close()


@dataclass
class Workers:
    """Several runs side by side, each in a process with so many threads. Close it at the end.

    Attributes:
        log: takes what workers say that belongs to no run.
    """

    artifacts: Path
    count: int
    threads: int
    log: Path
    _all: list[_Worker] = field(default_factory=list)

    def run(self, tasks: Sequence[Task], begun: Begun, ended: Ended) -> None:
        waiting, stop, sent, again = list(range(len(tasks))), GracefulStop(), 0, set[int]()
        with stop.installed(), stop.deferred() as requested:
            while (waiting and not requested()) or any(worker.task is not None for worker in self._all):
                if requested() and not sent:
                    sent = stop.number
                    for worker in self._all:
                        # Between two runs a worker hears no others.
                        worker.process.send_signal(sent if sent in STOPPING else signal.SIGTERM)
                while waiting and not requested() and (worker := self._idle()) is not None:
                    begun(waiting[0])
                    worker.give(waiting[0], tasks[waiting.pop(0)])
                for worker in self._ready_workers():
                    number, worker.task = worker.task, None
                    outcome = self._outcome(worker, stopping=bool(sent))
                    if number is not None and outcome.lost and number not in again:
                        # What ends a process says nothing of the run: it goes on once from where it was.
                        again.add(number)
                        waiting.append(number)
                    elif number is not None:
                        ended(number, outcome)
            stop.raise_if_requested()

    def close(self) -> None:
        """End the processes; at once, in the middle of whatever they do."""
        for worker in self._all:
            worker.close_stdin()
        for worker in self._all:
            worker.wait()
        self._all.clear()

    def _idle(self) -> _Worker | None:
        for worker in self._all:
            if worker.task is None:
                return worker
        if len(self._all) == self.count:
            return None
        self._all.append(self._started())
        return self._all[-1]

    def _started(self) -> _Worker:
        self.artifacts.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log, _signals_later():
            process = subprocess.Popen(
                [sys.executable, "-m", "limbeck.sweep.worker_process", str(self.artifacts), str(self.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
                # Ctrl-C in a terminal is for this process, which signals the workers once.
                start_new_session=True,
            )
        return _Worker(process)

    def _ready_workers(self) -> Iterator[_Worker]:
        """Workers that have ended a task, or themselves."""
        with selectors.DefaultSelector() as selector:
            for worker in self._all:
                selector.register(worker.outcomes, selectors.EVENT_READ, worker)
            ready = [key.data for key, _ in selector.select(LOOK_S)]
        yield from ready

    def _outcome(self, worker: _Worker, *, stopping: bool) -> Outcome:
        line = worker.outcomes.readline()
        if line.endswith("\n"):
            return Outcome(**json.loads(line))
        self._all.remove(worker)
        worker.close_stdin()
        code = worker.wait()
        if stopping:
            return Outcome(state="stopped")
        if code == -signal.SIGKILL:
            how = "was killed, as systems do when memory runs out; lower parallel or the batch sizes"
        else:
            how = f"ended with exit code {code}; {self.log} may say why"
        return Outcome(state="failed", error=f"its process {how}", lost=True)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Processes started inside the block get signals later, once they unblock them and can end in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def worker_pool(parallel: int, threads: int, artifacts: Path, log: Path) -> Iterator[WorkerPool]:
    """This process where runs are done one after another, else so many workers, ended with the block.

    Args:
        threads: of this process, shared out evenly.
    """
    if parallel == 1:
        yield InProcessPool()
        return
    workers = Workers(artifacts=artifacts, count=parallel, threads=max(1, threads // parallel), log=log)
    try:
        yield workers
    finally:
        workers.close()
