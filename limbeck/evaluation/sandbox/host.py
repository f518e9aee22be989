"""Entry of the sandbox: runs programs against their tests and returns verdicts.

Each program runs in a fresh interpreter that the kernel confines before the program is handed to it (`jail`,
`syscalls`): it reads the Python installation, writes to one directory of its own that ends with it, and reaches no
network, no other process, no signal, no thread and no further program. That directory is in memory, bounded by the
kernel and part of the program's memory (`tmpfs`); where a machine lets no process mount one, a program writes no file
at all, and the caller gets an error. Its tests run in a second such interpreter (`tester`) that gets nothing but values
from the first, so that the program can neither read what is expected nor say that it passed. Input is empty, and what
it prints goes nowhere.

What stays possible: to ask whether a path exists (stat) and where a link points, and to use the time, memory and disk
that the limits allow. What differs from tests in the same process: a function that the tests hand to the program is
refused, and an object of the program's own class is never equal to a plain value.
"""

from __future__ import annotations

import functools
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

from limbeck.evaluation.sandbox import jail, syscalls, trial
from limbeck.types import Json, LimbeckError

OutcomeKind = Literal[
    "passed", "wrong", "syntax", "exception", "exit", "killed", "timeout", "memory", "disk", "garbled", "unconfined"
]

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from limbeck.evaluation.sandbox.{} import main; main()"
_MOUNTS = (
    "import sys; sys.path.insert(0, sys.argv[1]); from limbeck.evaluation.sandbox.tmpfs import mount; "
    "mount(sys.argv[2], size_mb=1, entries=1)"
)
_SIGXCPU = 24
NO_FILES = "nothing to write: this machine lets no process mount a file system of its own (user namespaces, or root)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A program and its tests.

    Attributes:
        program: the program to be tested.
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
    """Limits of a program: seconds of processor (and twice as many by the clock), MiB, entries of its directory.

    Its files lie in memory, so `memory_mb` holds them too: they get `folder_mb` of it, a quarter at most.
    """

    timeout_s: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16
    folder_mb: int = 64
    folder_entries: int = 1000

    @property
    def cpu_s(self) -> int:
        return max(1, -int(-self.timeout_s // 1))

    @property
    def disk_mb(self) -> int:
        return max(1, min(self.folder_mb, self.memory_mb // 4))

    @property
    def process_mb(self) -> int:
        return max(1, self.memory_mb - self.disk_mb)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOutcome:
    """Outcome of a program: a verdict and its reason.

    Attributes:
        kind: "passed" or why not: "wrong" is an assertion of the tests, "exit" the end of the process, "garbled" an
            answer that is none.
        text: what there is to say about it, one short line.
    """

    kind: OutcomeKind
    text: str = ""

    @property
    def passed(self) -> bool:
        return self.kind == "passed"


def require_sandbox(scratch: Path, limits: Limits, *, section: str, otherwise: str) -> Json:
    """Check that programs can be confined here, and say how they are.

    Args:
        section: of the recipe, which has the limits.
        otherwise: what to do without a sandbox, for messages.

    Raises:
        LimbeckError: this machine cannot, or a trial shows that it does not.
    """
    lacking = jail.missing()
    if lacking:
        raise LimbeckError(
            f"programs that a model wrote are run in a sandbox only, and this machine has no {lacking}; "
            f"go on where there is one, or {otherwise}"
        )
    files = files_possible()
    tests = trial.tests(limits.disk_mb << 20 if files else 0)
    found = run_program(Job(program=trial.PROGRAM, setup="", names=trial.NAMES, tests=tests), limits, scratch)
    if not found.passed:
        raise LimbeckError(
            f"the sandbox for programs failed its trial ({found.kind}: {found.text}); raise {section}.memory_mb or "
            f"{section}.timeout_s, or {otherwise}"
        )
    return {
        "system_calls": f"seccomp allows {len(syscalls.ALLOWED_SYSCALLS) + 4}, none that makes a process, a thread "
        "or a socket",
        "file_system": f"Landlock version {jail.landlock_version()}: the Python installation, and "
        + (f"a directory in memory of {limits.disk_mb} MiB to write" if files else NO_FILES),
        "privileges": "no capabilities, none to gain",
        "verdict": "tests run in another process than the program",
        "limits": asdict(limits),
    }


@functools.cache
def files_possible() -> bool:
    """Whether this machine lets a process mount a directory that the kernel bounds; else no program may write."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-S", "-c", _MOUNTS, _PACKAGE_ROOT, folder]
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode == 0


def run_programs(jobs: Sequence[Job], limits: Limits, scratch: Path) -> Iterator[tuple[int, ProgramOutcome]]:
    """Verdicts with the numbers of their jobs, in order; as many run at once as there are processors."""
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = {}
        for number in range(len(jobs) + workers):
            if number < len(jobs):
                waiting[number] = pool.submit(run_program, jobs[number], limits, scratch)
            if number >= workers:
                yield number - workers, waiting.pop(number - workers).result()


def run_program(job: Job, limits: Limits, scratch: Path) -> ProgramOutcome:
    """The verdict on one program.

    Args:
        scratch: where the directory lies that its own one is mounted over; nothing is ever written to it.

    Raises:
        LimbeckError: its process could not be confined; the program has not run.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        verdict = _run_in(folder, job, limits)
    finally:
        folder.rmdir()
    if verdict.kind == "unconfined":
        raise LimbeckError(
            f"a program could not be confined and was not run ({verdict.text}); see that nothing else limits this "
            "process, or take humaneval and mbpp out of evaluate.groups.tasks.files"
        )
    return verdict


def _run_in(folder: Path, job: Job, limits: Limits) -> ProgramOutcome:
    asking, asked, answering, answered = (end for pair in (os.pipe(), os.pipe()) for end in reversed(pair))
    reading, writing = os.pipe()
    fixed = (str(limits.process_mb), str(limits.cpu_s))
    own = (str(folder), str(limits.disk_mb), str(limits.folder_entries)) if files_possible() else ()
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(asdict(job)).encode())
        given.seek(0)
        candidate = _start("candidate", folder, (asked, answering), (*fixed, str(limits.file_mb), *own))
        tester = _start("tester", folder, (answered, asking), fixed, stdin=given.fileno(), stdout=writing)
    for end in (asking, asked, answering, answered, writing):
        os.close(end)
    try:
        said, over = _listen(reading, limits)
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


def _listen(reading: int, limits: Limits) -> tuple[bytes, ProgramOutcome | None]:
    """The tester's output, or the verdict where it took too long or too much."""
    said, until = b"", time.monotonic() + 2 * limits.timeout_s
    while select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            return said, None
        said += part
    return said, ProgramOutcome(kind="timeout", text=f"more than {2 * limits.timeout_s:g} s by the clock")


def _verdict(said: bytes, candidate_code: int, tester_code: int) -> ProgramOutcome:
    if not said:
        kind = "timeout" if tester_code == -_SIGXCPU else "killed"
        return ProgramOutcome(kind=kind, text=f"the process of the tests ended with {tester_code}")
    found = json.loads(said)
    if found["kind"] != "ended":
        return ProgramOutcome(kind=cast(OutcomeKind, found["kind"]), text=found["text"])
    text = f"the process of the program ended with {candidate_code}"
    if candidate_code == -_SIGXCPU:
        return ProgramOutcome(kind="timeout", text=text)
    return ProgramOutcome(kind="killed" if candidate_code < 0 else "exit", text=text)
