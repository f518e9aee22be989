"""The real command, each time in a process of its own, without paying for its imports each time.

A server imports torch, transformers and limbeck once, and forks for every command. The fork runs `python -m limbeck`'s
own module with the arguments given: it has its own process id, memory, files and signals, so it can be killed, limited
and interrupted like any other. Only the seconds before the first line of limbeck's code are left out.
"""

from __future__ import annotations

import ctypes
import fnmatch
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 300.0
_PR_SET_PDEATHSIG = 1
_OF_EVERY_RUN = (
    "accelerate",
    "datasets",
    "limbeck.api",
    "limbeck.cli",
    "limbeck.pipeline.engine",
    "limbeck.pipeline.plan.room",
    "limbeck.pipeline.stage_order",
    "limbeck.report",
    "peft",
    "rouge_score.rouge_scorer",
    "safetensors.numpy",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.optimization",
)


@dataclass(frozen=True)
class KillAt:
    """A moment for kill -9, or another signal: just before a change below `root` takes effect.

    A change is a file opened for writing, a folder made, a name given, moved or removed.

    Attributes:
        name: pattern of the changed path, relative to `root`.
        writes: so many such changes are let through first.
        number: of the signal.
    """

    root: Path
    name: str = "*"
    writes: int = 0
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class Finished:
    """How a command ended: exit code (minus the signal's number where one killed it) and what it said."""

    code: int
    stdout: str
    stderr: str

    @property
    def error_line(self) -> str:
        """The one line of an error; fails where there are several, or a traceback."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("limbeck: ")]
        assert "Traceback" not in self.stderr, self.stderr
        assert len(lines) == 1 and self.stderr.splitlines()[-1] == lines[0], self.stderr
        return lines[0]


@dataclass
class Command:
    """A command that runs."""

    server: CommandServer
    pid: int
    folder: Path
    code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code is not None

    def send(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def kill(self) -> Finished:
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, limit_s: float = LIMIT_S) -> Finished:
        assert self.wait_until(lambda: False, limit_s) is False
        assert self.code is not None
        return Finished(self.code, (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text())

    def wait_until(self, happened: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
        """Whether it happened before the command ended."""
        deadline = time.monotonic() + limit_s
        while not happened():
            if self.ended():
                return happened()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(
                    f"the command was not done after {limit_s} s: {(self.folder / 'stderr').read_text()}"
                )
            time.sleep(0.002)
        return True


@dataclass
class CommandServer:
    """Starts commands. Close it at the end."""

    folder: Path
    count: int = 0
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.limbeck_command"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                # Where transformers copies the Python files that come with a model.
                "HF_MODULES_CACHE": str(self.folder / "modules"),
            },
        )

    def ask(self, question: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the command server ended with exit code {self.process.wait(60)}: its reason is on stderr above"
        return json.loads(answer)

    def start(
        self,
        *args: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        file_limit: int | None = None,
        killed: KillAt | None = None,
    ) -> Command:
        """Start `limbeck ARGS`.

        Args:
            file_limit: bytes a file may have at most; writing more fails as on a full disk.
        """
        self.count += 1
        folder = self.folder / f"{self.count:04d}"
        folder.mkdir(parents=True)
        pid = self.ask(
            {
                "args": [str(arg) for arg in args],
                "cwd": str(cwd or folder),
                "env": dict(env or {}),
                "file_limit": file_limit,
                "folder": str(folder),
                "killed": None if killed is None else (str(killed.root), killed.name, killed.writes, killed.number),
            }
        )
        return Command(self, pid, folder)

    def run(
        self,
        *args: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        file_limit: int | None = None,
        killed: KillAt | None = None,
    ) -> Finished:
        """Run `limbeck ARGS` to its end."""
        return self.start(*args, cwd=cwd, env=env, file_limit=file_limit, killed=killed).wait()

    def launch(
        self,
        *args: str | Path,
        ranks: int = 2,
        killed: Mapping[int, KillAt] = MappingProxyType({}),
    ) -> list[Command]:
        """Start the ranks of a launch of `limbeck ARGS` on the CPU, where one that dies ends no other."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        shared |= {"WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        return [
            self.start(
                *args,
                env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                killed=killed.get(rank),
            )
            for rank in range(ranks)
        ]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def all_end(ranks: Sequence[Command]) -> list[Finished]:
    """How the ranks of a launch ended, all with exit code 0."""
    ends = [rank.wait() for rank in ranks]
    assert not any(end.code for end in ends), "\n".join(end.stderr[-3000:] for end in ends)
    return ends


def serve() -> None:
    """Answer questions, one JSON line each, until the input ends."""
    _import_all()
    codes: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid = question["poll"]
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        else:
            answer = os.fork()
            if answer == 0:
                _become(question)
            # The system gives numbers of processes again: an earlier one's code is not this one's.
            codes.pop(answer, None)
        print(json.dumps(answer), flush=True)
    # Nothing here needs the seconds that an orderly end of torch takes.
    os._exit(0)


def _import_all() -> None:
    """Everything that every run would import or prepare, and nothing that starts a thread."""
    for name in _OF_EVERY_RUN:
        importlib.import_module(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from limbeck.report.environment import environment

    # Both compile hundreds of expressions, once a process.
    get_checkpoint_conversion_mapping("llama")
    environment(escaped=True).get_template("report.html.j2")
    torch.set_num_threads(1)


def signalled_at(root: str, name: str, writes: int, number: int) -> None:
    """Send this process a signal from within, by Python's own report of what it is about to do."""
    changes = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0}
    seen = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            if not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            path = args[0]
        elif event in changes:
            path = args[changes[event]]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not os.path.isabs(path):
            return
        relative = os.path.relpath(path, root)
        if not relative.startswith("..") and fnmatch.fnmatchcase(relative, name):
            if seen == writes:
                os.kill(os.getpid(), number)
            seen += 1

    sys.addaudithook(audit)


def _become(question: dict[str, Any]) -> None:
    """In the fork: be the command, and never come back."""
    folder = Path(question["folder"])
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.setsid()
        if sys.platform == "linux":
            # Should the tests be killed, their commands die too.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(question["cwd"])
        os.environ.update(question["env"])
        if question["file_limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (question["file_limit"], resource.RLIM_INFINITY))
        if question["killed"] is not None:
            signalled_at(*question["killed"])
        sys.argv = ["limbeck", *question["args"]]
        runpy.run_module("limbeck", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
