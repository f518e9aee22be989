"""The sandbox's disk: no program holds more than its limit at any moment, and none has a wrong answer pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from limbeck.evaluation.sandbox import host, jail
from limbeck.evaluation.sandbox.host import Job, Limits, files_possible, require_sandbox, run_program
from limbeck.evaluation.sandbox.log import verdicts_of
from limbeck.types import LimbeckError
from tests.evaluation.disk_watch import LIMITS
from tests.evaluation.sandbox_attacks import ENDLESS, GOOD
from tests.evaluation.sandbox_disk_attacks import DISK, FORGED

confined = pytest.mark.skipif(bool(jail.missing()), reason=f"this machine has no {jail.missing()}")
mounting = pytest.mark.skipif(
    not files_possible(), reason="this machine lets no process mount a file system of its own"
)

PATIENT = Limits(timeout_s=20.0, memory_mb=256)
SECTION = "evaluate.groups.tasks"
WRITES = "def add(a, b):\n    with open('x', 'w') as f: f.write(str(a + b))\n    return int(open('x').read())\n"
MIB = 1 << 20


def job(program: str) -> Job:
    return Job(program=program, setup="", names=("add",), tests="assert add(1, 2) == 3\nassert add(-5, 5) == 0\n")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All attacks on the disk, one after another, and the most that each held at any moment."""
    command = [sys.executable, "-m", "tests.evaluation.disk_watch", str(tmp_path_factory.mktemp("scratch"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@confined
@mounting
@pytest.mark.parametrize("name", DISK)
def test_no_program_holds_more_on_disk_than_it_may(name: str, watched: dict[str, Any]) -> None:
    found = watched[name]
    assert found["kind"] in DISK[name][1], found
    assert found["looks"] > 20, "it was not looked often enough for this to mean something"
    assert found["disk"] <= MIB and found["own"] <= LIMITS.disk_mb * MIB and found["left"] == []
    # The mount itself is one.
    assert found["entries"] <= LIMITS.folder_entries + 1
    # Its files are memory too, and both together stay below the one limit.
    assert found["both_kb"] <= LIMITS.memory_mb * 1024


@confined
@mounting
def test_the_watch_sees_what_a_program_holds(watched: dict[str, Any]) -> None:
    """Else the test above could not fail."""
    assert watched["unlinked files held by a native page *"]["own"] > (LIMITS.disk_mb - 1) * MIB
    assert watched["1,500 nested directories *"]["entries"] > LIMITS.folder_entries - 20
    assert watched["memory and disk together"]["both_kb"] > (LIMITS.memory_mb - 16) * 1024


@confined
@pytest.mark.parametrize("name", FORGED)
def test_no_wrong_answer_passes(name: str, tmp_path: Path) -> None:
    program, kinds = FORGED[name]
    limits = replace(PATIENT, timeout_s=1.0) if kinds & ENDLESS else PATIENT
    verdict = run_program(job(program), limits, tmp_path)
    assert not verdict.passed and verdict.kind in kinds, verdict
    assert run_program(job(GOOD), PATIENT, tmp_path).passed


@confined
def test_where_nothing_bounds_a_directory_no_program_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, jobs = tmp_path / "log.jsonl", [job(WRITES), job(GOOD)]

    def passed() -> list[bool]:
        found = dict(verdicts_of(jobs, PATIENT, log=log, scratch=tmp_path / "scratch"))
        return [found[number].passed for number in range(len(jobs))]

    assert passed() == [files_possible(), True]
    for module in ("host", "log"):
        monkeypatch.setattr(f"limbeck.evaluation.sandbox.{module}.files_possible", lambda: False)
    found = require_sandbox(tmp_path, PATIENT, section=SECTION, otherwise="leave them out")
    assert "nothing to write: this machine lets no process mount" in found["file_system"]
    assert passed() == [False, True], "a verdict of a machine where programs write files is none of this one"
    for attack in (
        "unlinked files held by a native page *",
        "1,500 nested directories *",
        "nameless files (O_TMPFILE)",
    ):
        verdict = run_program(job(DISK[attack][0]), PATIENT, tmp_path)
        assert verdict.kind == "exception" and "Permission denied" in verdict.text, verdict


@confined
@mounting
def test_a_directory_that_is_not_bounded_as_it_should_be_fails_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = host._start

    def larger(role: str, folder: Path, pipes: tuple[int, int], arguments: tuple[str, ...], **more: Any) -> Any:
        if role == "candidate":
            arguments = (*arguments[:-2], str(2 * int(arguments[-2])), arguments[-1])
        return start(role, folder, pipes, arguments, **more)

    monkeypatch.setattr(host, "_start", larger)
    with pytest.raises(LimbeckError, match=r"failed its trial \(wrong: AssertionError: more on disk than allowed"):
        require_sandbox(tmp_path, PATIENT, section=SECTION, otherwise="leave them out")


@confined
@mounting
def test_a_program_whose_directory_cannot_be_mounted_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = host._start

    def nowhere(role: str, folder: Path, pipes: tuple[int, int], arguments: tuple[str, ...], **more: Any) -> Any:
        arguments = (*arguments[:-3], "/nowhere", *arguments[-2:]) if role == "candidate" else arguments
        return start(role, folder, pipes, arguments, **more)

    monkeypatch.setattr(host, "_start", nowhere)
    with pytest.raises(LimbeckError, match=r"could not be confined and was not run .*mount of tmpfs: No such file"):
        run_program(job(GOOD), PATIENT, tmp_path)


# As an ordinary user, as root without user namespaces, and as a user without them.
_AS = """
import ctypes, os, sys
from pathlib import Path
from limbeck.evaluation.sandbox.host import Limits, files_possible, require_sandbox
scratch, user, namespaces = sys.argv[1:]
outside = os.geteuid(), os.getegid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
Path("/proc/self/setgroups").write_text("deny")
for name, number in zip(("uid_map", "gid_map"), outside):
    Path("/proc/self", name).write_text(f"{user} {number} 1")
if namespaces == "no":
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
found = require_sandbox(Path(scratch), Limits(timeout_s=20.0), section="tasks", otherwise="leave them out")
print(os.geteuid(), files_possible(), found["file_system"])
"""


@confined
@mounting
@pytest.mark.skipif(not os.path.exists("/proc/sys/user/max_user_namespaces"), reason="no limit of user namespaces")
@pytest.mark.parametrize(("user", "namespaces", "files"), [(1000, "yes", True), (0, "no", True), (1000, "no", False)])
def test_whoever_runs_it_is_bounded_or_told(user: int, namespaces: str, files: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _AS, str(tmp_path), str(user), namespaces]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"{user} {files} "), done
    assert ("a directory in memory of 64 MiB" in done.stdout) == files


@confined
def test_a_kill_leaves_nothing_of_what_a_program_made(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom limbeck.evaluation.sandbox.host import Job, Limits, run_program\n"
        'program = \'import os, time\\ntry:\\n    while True:\\n        os.mkdir("d")\\n        os.chdir("d")\\n\'\n'
        "program += 'except OSError:\\n    time.sleep(1000)'\n"
        "limits = Limits(timeout_s=500, folder_entries=5000)\n"
        "run_program(Job(program=program, setup='', names=(), tests=''), limits, Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    until = time.monotonic() + 20
    while not list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(1.0)
    parent.kill()
    parent.wait()
    (folder,) = tmp_path.iterdir()
    assert list(folder.iterdir()) == []
    folder.rmdir()
