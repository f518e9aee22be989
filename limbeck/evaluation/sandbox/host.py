"""The door of the sandbox: programs and their tests go in, verdicts come out.

Each program runs in a fresh interpreter that the kernel confines before the program is handed to it (`jail`,
`syscalls`): it reads the Python installation, writes to one directory of its own that is removed afterwards, and
reaches no network, no other process, no signal, no thread and no further program. Its tests run in a second such
interpreter (`tester`) that gets nothing but values from the first, so that the program can neither read what is
expected nor say that it passed. Input is empty, and what it prints goes nowhere.

What stays possible: to ask whether a path exists (stat) and where a link points, and to use the time, memory and disk
that the limits allow. What differs from tests in the same process: a function that the tests hand to the program is
refused, and an object of the program's own class is never equal to a plain value.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from limbeck.evaluation.sandbox import jail, syscalls
from limbeck.evaluation.sandbox.folders import larger_than, remove
from limbeck.flow import LimbeckError
from limbeck.rundir import Json

Kind = Literal[
    "passed", "wrong", "syntax", "exception", "exit", "killed", "timeout", "memory", "disk", "garbled", "unconfined"
]

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from limbeck.evaluation.sandbox.{} import main; main()"
# How often it is looked whether the time or the disk is used up.
_TICK_S = 0.05
_SIGXCPU = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A program and what it is tested with.

    Attributes:
        program: what is judged.
        setup: runs before the tests, in their process: imports, the helpers of a problem.
        names: of the program, for the tests to use. All else that the tests see is Python's or their own.
        tests: pass where they run through without an exception.
    """

    program: str
    setup: str
    names: tuple[str, ...]
    tests: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use: seconds of processor (and twice as many by the clock), MiB, entries of its directory."""

    timeout_s: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16
    folder_mb: int = 64
    folder_entries: int = 1000

    @property
    def cpu_s(self) -> int:
        return max(1, -int(-self.timeout_s // 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a program did.

    Attributes:
        kind: "passed" or why not: "wrong" is an assertion of the tests, "exit" the end of the process, "garbled" an
            answer that is none.
        text: what there is to say about it, one short line.
    """

    kind: Kind
    text: str = ""

    @property
    def passed(self) -> bool:
        return self.kind == "passed"


def require_sandbox(scratch: Path, limits: Limits) -> Json:
    """Check that programs can be confined here, and say how they are.

    Raises:
        LimbeckError: this machine cannot, or a trial shows that it does not.
    """
    lacking = jail.missing()
    if lacking:
        raise LimbeckError(
            f"programs that a model wrote are run in a sandbox only, and this machine has no {lacking}; "
            "evaluate on a machine that has, or take humaneval and mbpp out of evaluate.tasks.files"
        )
    reach = "import socket\ndef outside():\n    open('/etc/passwd')\ndef net():\n    socket.socket()\n"
    attempts = "".join(
        f"try:\n    {call}()\n    raise AssertionError('{call}')\nexcept PermissionError:\n    pass\n"
        for call in ("outside", "net")
    )
    trial = run(Job(program=reach, setup="", names=("outside", "net"), tests=attempts), limits, scratch)
    if not trial.passed:
        raise LimbeckError(
            f"the sandbox for programs failed its trial ({trial.kind}: {trial.text}); raise evaluate.tasks.memory_mb "
            "or evaluate.tasks.timeout_s, or take humaneval and mbpp out of evaluate.tasks.files"
        )
    return {
        "system_calls": f"seccomp allows {len(syscalls.ALLOWED) + 4}, none that makes a process, a thread or a socket",
        "file_system": f"Landlock version {jail.landlock_version()}: the Python installation, and a directory to write",
        "privileges": "no capabilities, none to gain",
        "verdict": "tests run in another process than the program",
        "limits": asdict(limits),
    }


def run_all(jobs: Sequence[Job], limits: Limits, scratch: Path) -> Iterator[tuple[int, Verdict]]:
    """Verdicts with the numbers of their jobs, in order; as many run at once as there are processors."""
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = {}
        for number in range(len(jobs) + workers):
            if number < len(jobs):
                waiting[number] = pool.submit(run, jobs[number], limits, scratch)
            if number >= workers:
                yield number - workers, waiting.pop(number - workers).result()


def run(job: Job, limits: Limits, scratch: Path) -> Verdict:
    """The verdict on one program.

    Args:
        scratch: where its directory is made, and removed.

    Raises:
        LimbeckError: its process could not be confined; the program has not run.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        verdict = _run_in(folder, job, limits)
    finally:
        remove(folder)
    if verdict.kind == "unconfined":
        raise LimbeckError(
            f"a program could not be confined and was not run ({verdict.text}); see that nothing else limits this "
            "process, or take humaneval and mbpp out of evaluate.tasks.files"
        )
    return verdict


def _run_in(folder: Path, job: Job, limits: Limits) -> Verdict:
    asking, asked, telling, told = (end for pair in (os.pipe(), os.pipe()) for end in reversed(pair))
    reading, writing = os.pipe()
    fixed = (str(limits.memory_mb), str(limits.cpu_s))
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(asdict(job)).encode())
        given.seek(0)
        candidate = _start("candidate", folder, (asked, telling), (str(folder), *fixed, str(limits.file_mb)))
        tester = _start("tester", folder, (told, asking), fixed, stdin=given.fileno(), stdout=writing)
    for end in (asking, asked, telling, told, writing):
        os.close(end)
    try:
        said, over = _listen(reading, folder, limits)
    finally:
        for process in (candidate, tester):
            process.kill()
        codes = (candidate.wait(), tester.wait())
        os.close(reading)
    return over or _verdict(said, *codes)


def _start(
    role: str,
    folder: Path,
    pipes: tuple[int, int],
    arguments: tuple[str, ...],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """An interpreter of its own: without site packages, environment, terminal or open files."""
    return subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT.format(role)),
            *(_PACKAGE_ROOT, *map(str, pipes), *arguments),
        ],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        # A Python that finds its own library by this alone would not start without it.
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        pass_fds=pipes,
        start_new_session=True,
    )


def _listen(reading: int, folder: Path, limits: Limits) -> tuple[bytes, Verdict | None]:
    """What the tester says, or why it is not waited for any longer."""
    said, until = b"", time.monotonic() + 2 * limits.timeout_s
    while True:
        if select.select([reading], [], [], _TICK_S)[0]:
            part = os.read(reading, 1 << 16)
            if not part:
                return said, None
            said += part
        elif time.monotonic() > until:
            return said, Verdict(kind="timeout", text=f"more than {2 * limits.timeout_s:g} s by the clock")
        elif larger_than(folder, entries=limits.folder_entries, size=limits.folder_mb << 20):
            most = f"{limits.folder_mb} MiB or {limits.folder_entries} entries"
            return said, Verdict(kind="disk", text=f"more than {most}")


def _verdict(said: bytes, candidate_code: int, tester_code: int) -> Verdict:
    if not said:
        kind = "timeout" if tester_code == -_SIGXCPU else "killed"
        return Verdict(kind=kind, text=f"the process of the tests ended with {tester_code}")
    found = json.loads(said)
    if found["kind"] != "ended":
        return Verdict(kind=cast(Kind, found["kind"]), text=found["text"])
    text = f"the process of the program ended with {candidate_code}"
    if candidate_code == -_SIGXCPU:
        return Verdict(kind="timeout", text=text)
    return Verdict(kind="killed" if candidate_code < 0 else "exit", text=text)
