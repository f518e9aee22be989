"""The sandbox: no attack gets anywhere, what is honest passes, and no machine runs a program with less."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest

from limbeck.evaluation.sandbox import jail, syscalls
from limbeck.evaluation.sandbox.host import Job, Limits, files_possible, require_sandbox, run_program
from limbeck.evaluation.sandbox.log import verdicts_of
from limbeck.evaluation.sandbox.tester import Program, verdict_on
from limbeck.evaluation.sandbox.wire import Link
from limbeck.types import LimbeckError
from tests.evaluation.sandbox_attacks import ATTACKS, GOOD

confined = pytest.mark.skipif(bool(jail.missing()), reason=f"this machine has no {jail.missing()}")

LIMITS = Limits(memory_mb=256, file_mb=1, folder_mb=8, folder_entries=200)
SECTION = "evaluate.groups.tasks"
# Enough for an honest program on a machine that is busy otherwise.
PATIENT = Limits(timeout_s=20.0, memory_mb=256)
TESTS = "assert add(1, 2) == 3\nassert add(-5, 5) == 0\n"


def job(program: str, tests: str = TESTS, setup: str = "", names: tuple[str, ...] = ("add",)) -> Job:
    return Job(program=program, setup=setup, names=names, tests=tests)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home") / "secret"
    path.write_text("the secret")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def verdicts(secret: Path, tmp_path_factory: pytest.TempPathFactory):
    """All attacks, a few at a time, each with a good program right after it; and where they ran."""
    scratch = tmp_path_factory.mktemp("scratch")

    def outcome(name: str):
        program, kinds = ATTACKS[name]
        program = program.replace("{secret!r}", repr(str(secret))).replace("{cwd!r}", repr(os.getcwd()))
        limits = replace(LIMITS, timeout_s=0.4 if "timeout" in kinds else PATIENT.timeout_s)
        return run_program(job(program), limits, scratch), run_program(job(GOOD), PATIENT, scratch)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(ATTACKS, pool.map(outcome, ATTACKS), strict=True)), scratch


@confined
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_a_failed_sample_and_nothing_else(name, verdicts):
    attack, after = verdicts[0][name]
    # Where no program may write, it ends with an error before it fills anything.
    assert not attack.passed and attack.kind in ATTACKS[name][1] | (set() if files_possible() else {"exception"}), (
        attack
    )
    assert after.passed, after


@confined
def test_nothing_is_left_of_the_attacks(verdicts, secret):
    assert os.listdir(verdicts[1]) == []
    assert secret.read_text() == "the secret" and os.listdir(secret.parent) == ["secret"]
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not Path("escaped").exists() and not Path("/tmp/limbeck-escaped").exists()


# Honest programs that use more than numbers: program, tests, names of the program.
HONEST = {
    "files of its own": (
        "def add(a, b):\n    with open('x', 'w') as f: f.write(str(a + b))\n    return int(open('x').read())",
        TESTS,
    ),
    "much output": ("def add(a, b):\n    print('\\u202e' * 10 ** 6)\n    return a + b", TESTS),
    "an argument changed in place": (
        "def add(a, b):\n    a.append({b: [a[0]]})",
        "x = [1]\nadd(x, 2)\nassert x == [1, {2: [1]}]",
    ),
    "an exception that is expected": (
        "def add(a, b):\n    raise KeyError(a)",
        "try:\n    add(1, 2)\n    assert False\nexcept KeyError:\n    pass",
    ),
    "a generator": ("def add(a, b):\n    yield a\n    yield b", "assert list(add(1, 2)) == [1, 2]"),
    "a function": ("def add(a):\n    return lambda b: a + b", "assert add(1)(2) == 3"),
    "a match": (
        "import re\ndef add(a):\n    return re.match('x+', a)",
        "assert add('xx').group() == 'xx'\nassert not add('y')",
    ),
    "subclasses": (
        "from collections import Counter, namedtuple\nfrom enum import IntEnum\nE = IntEnum('E', 'A B')\n"
        "P = namedtuple('P', 'x y')\ndef add(a, b):\n    return [Counter(a), P(a, b), E.B, True]",
        "assert add('aab', None) == [{'a': 2, 'b': 1}, ('aab', None), 2, True]",
    ),
    "data classes": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
        "class add:\n    x: int\n    y: int = 2\n",
        "p = add(1)\nassert p.y == 2 and p == add(1, 2) and p != add(1, 3) and p != (1, 2)\n"
        "p.y = 5\nassert str(p) == 'add(x=1, y=5)'",
    ),
    "large numbers": ("def add(a, b):\n    return a ** b", "assert add(7, 9000) == 7 ** 9000"),
}  # fmt: skip


@confined
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(name, tmp_path):
    verdict = run_program(job(*HONEST[name]), PATIENT, tmp_path)
    assert verdict.passed == ("files" not in name or files_possible()), verdict


@confined
def test_the_tests_see_nothing_of_the_program_but_its_names(tmp_path):
    """A program that redefines what the tests compute with does not change what they compute."""
    program = "import builtins, math\nmath.isclose = lambda *a: True\nbuiltins.abs = lambda x: 0\nabs = builtins.abs\n"
    program += "def helper(x): return 3\ndef add(a, b): return 0"
    for tests in (
        "assert math.isclose(add(1, 2), 3)",
        "assert abs(add(1, 2) - 3) < 1",
        "assert helper(add(1, 2)) == 3",
    ):
        verdict = run_program(job(program, tests, "import math\ndef helper(x): return x\n"), PATIENT, tmp_path)
        assert verdict.kind == "wrong", tests


@confined
def test_the_killed_parent_takes_a_program_along(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom limbeck.evaluation.sandbox.host import Job, Limits, run_program\n"
        "program = 'import time\\ntime.sleep(1000)'\n"
        "run_program(Job(program=program, setup='', names=(), tests=''), Limits(timeout_s=500), Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])

    def children() -> list[Path]:
        found = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(parent.pid)]
        return [path for path in found if path.exists() and str(tmp_path).encode() in _read(path / "cmdline")]

    until = time.monotonic() + 20
    while not children() and time.monotonic() < until:
        time.sleep(0.02)
    assert children()
    time.sleep(0.2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while children() and time.monotonic() < until:
        time.sleep(0.02)
    assert not children()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@confined
def test_what_is_in_force_is_reported_and_tried(tmp_path):
    record = require_sandbox(tmp_path, PATIENT, section=SECTION, otherwise="leave them out")
    assert "seccomp" in record["system_calls"] and f"version {jail.landlock_version()}" in record["file_system"]
    assert record["limits"]["memory_mb"] == 256


@pytest.mark.parametrize("lost", ["landlock", "machine"])
def test_a_machine_with_less_is_refused(lost, tmp_path, monkeypatch):
    if lost == "landlock":
        monkeypatch.setattr(jail, "landlock_version", lambda: 0)
        expected = "this machine has no Landlock"
    else:
        monkeypatch.setattr(syscalls, "MACHINES", {"m68k": (0, 4)})
        expected = "Linux on m68k"
    with pytest.raises(LimbeckError, match=f"{expected}.*leave them out"):
        require_sandbox(tmp_path, LIMITS, section=SECTION, otherwise="leave them out")


@confined
def test_a_program_whose_process_does_not_say_that_it_is_confined_is_not_run(tmp_path):
    class Elsewhere:
        def __init__(self, said: dict[str, Any] | None) -> None:
            self.said = said

        def receive(self) -> dict[str, Any] | None:
            return self.said

        def send(self, message: dict[str, Any]) -> None:
            pytest.fail(f"{message} was sent to a process that is not confined")

    for said in (None, {"unconfined": "no Landlock"}):
        verdict = verdict_on(Program(cast(Link, Elsewhere(said))), asdict(job(GOOD)))
        assert verdict["kind"] == "unconfined"
    with pytest.raises(LimbeckError, match=r"failed its trial.*evaluate\.groups\.tasks\.memory_mb"):
        require_sandbox(tmp_path, Limits(memory_mb=1), section=SECTION, otherwise="leave them out")


@confined
def test_time_of_the_processor_is_told_from_other_ends(tmp_path):
    verdict = run_program(job("while True: pass"), Limits(timeout_s=1.0), tmp_path)
    # On a busy machine two seconds by the clock may pass before one of the processor.
    assert verdict.kind == "timeout" and verdict.text.endswith(("-24", "clock"))


@confined
def test_verdicts_are_kept_and_a_cut_line_is_judged_again(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    jobs = [job(GOOD), job("def add(a, b): return 0"), job(GOOD)]

    def passed() -> list[bool]:
        found = dict(verdicts_of(jobs, PATIENT, log=log, scratch=tmp_path / "scratch"))
        return [found[number].passed for number in range(len(jobs))]

    assert passed() == [True, False, True]
    whole = log.read_text()
    assert whole.count("\n") == 2, "equal programs are run once"
    log.write_text(whole[:-10])
    assert passed() == [True, False, True] and log.read_text() == whole
    monkeypatch.setattr("limbeck.evaluation.sandbox.log.run_programs", None)
    assert passed() == [True, False, True]
    odd = ('{"job": [1], "kind": "passed", "text": ""}', '{"job": "x", "kind": ["passed"], "text": ""}')
    for line in ("{}", *odd, '{"job": "x", "kind": "perfect", "text": ""}', "[" * 10**5 + "]" * 10**5):
        log.write_text(f"{line}\n" + whole)
        with pytest.raises(LimbeckError, match=r"log\.jsonl:1 is damaged"):
            passed()
