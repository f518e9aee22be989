"""Runs of a sweep that commands of the user's start, such as srun, several side by side.

    arms/ARM/seed=S.ID.task.json     what the process that the command starts is to do
    arms/ARM/seed=S.ID.outcome.json  how that ended; both are gone once the sweep has read it

Each sending has an ID of its own. A command that a scheduler starts after its sweep has ended finds no task and does
nothing, so that no run is made twice.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from limbeck.runtime.files import read_json, write_json
from limbeck.runtime.interrupts import GracefulStop
from limbeck.sweep.tasks import Outcome, Task, log_of
from limbeck.sweep.template import words_of
from limbeck.sweep.workers import LOOK_S, Begun, Ended
from limbeck.types import LimbeckError

TASK, OUTCOME = ".task.json", ".outcome.json"
# Seconds after which a file that another machine has written is seen here.
SEEN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A run whose command is at work."""

    number: int
    process: subprocess.Popen[bytes]
    task: Path
    log: Path

    def stop(self) -> None:
        """Pass a stop on to the command and all that it has started here."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def outcome(self, *, stopping: bool) -> Outcome:
        """How the run ended, from its file; the files are removed."""
        code, path = self.process.wait(), outcome_of(self.task)
        deadline = time.monotonic() + (SEEN_S if code == 0 else 1.0)
        while not path.exists() and time.monotonic() < deadline and not stopping:
            time.sleep(LOOK_S)
        found = Outcome(**read_json(path)) if path.exists() else None
        self.task.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        if found is not None:
            return found
        if stopping:
            return Outcome(state="stopped")
        how = f"exit code {code}" if code else "exit code 0 before its run had ended (sbatch needs --wait)"
        return Outcome(state="failed", error=f"its command ended with {how}; {self.log} may say why", lost=True)


@dataclass(frozen=True, kw_only=True)
class CommandPool:
    """Starts each run by a command, so many side by side.

    Attributes:
        template: of the command; see `limbeck.sweep.template`.
    """

    template: str
    count: int

    def run(self, tasks: Sequence[Task], begun: Begun, ended: Ended) -> None:
        waiting, running, stop, asked = deque(enumerate(tasks)), list[_Sent](), GracefulStop(), False
        try:
            with stop.installed(), stop.deferred() as requested:
                while running or (waiting and not requested()):
                    if requested() and not asked:
                        asked = True
                        for sent in running:
                            sent.stop()
                    while waiting and not requested() and len(running) < self.count:
                        number, task = waiting.popleft()
                        begun(number)
                        running.append(self._sent(number, task))
                    for sent in [sent for sent in running if sent.process.poll() is not None]:
                        running.remove(sent)
                        ended(sent.number, sent.outcome(stopping=asked))
                    time.sleep(LOOK_S if running else 0)
                stop.raise_if_requested()
        finally:
            for sent in running:
                sent.stop()

    def _sent(self, number: int, task: Task) -> _Sent:
        directory, log = Path(task.directory), log_of(Path(task.directory))
        path = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}{TASK}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"folder": os.getcwd(), "task": asdict(task)})
        command = [sys.executable, "-m", "limbeck.sweep.sent_process", str(path.absolute())]
        words = words_of(self.template, command, {"run": str(directory.absolute()), "arm": task.arm})
        with log.open("ab") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal is for this process, which passes it on once.
                start_new_session=True,
            )
        return _Sent(number=number, process=process, task=path, log=log)


def outcome_of(task: Path) -> Path:
    """The file beside a task that says how it ended."""
    return task.with_name(task.name.removesuffix(TASK) + OUTCOME)


def require_program(template: str) -> None:
    """See that the program of a template is there.

    Raises:
        LimbeckError: it is not.
    """
    program = words_of(template, [sys.executable], {"run": "run", "arm": "arm"})[0]
    if shutil.which(program) is None:
        raise LimbeckError(f"command: no program {program!r} on PATH; expected one at the start of {template!r}")


def discard_sent(root: Path) -> None:
    """Remove what an ended sweep has sent and no process has begun; call it while none is at work."""
    for path in _left(root):
        path.unlink(missing_ok=True)


def _left(root: Path) -> Iterator[Path]:
    for place in ("", "arms/*/", "arms/*/tune/"):
        for end in (TASK, OUTCOME):
            yield from root.glob(f"{place}*{end}")


@contextmanager
def command_pool(template: str, parallel: int) -> Iterator[CommandPool]:
    """A pool that needs no end of its own: each command ends with its run."""
    yield CommandPool(template=template, count=parallel)
