"""Threads spin as ever on quiet cores, and hardly at all while other processes want the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from limbeck.pipeline import engine
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime import spin_waits
from limbeck.runtime.spin_waits import BUSY, QUIET, QUIET_S, SpinWatch, waited_s

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
CORES = sorted(os.sched_getaffinity(0))[:2] if sys.platform == "linux" else []
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")

PREPARED = f"""
import os, sys, time
os.sched_setaffinity(0, {CORES})
import torch
from limbeck.runtime import spin_waits
ones = torch.ones(100_000)
"""


def answers(script: str) -> list[float]:
    """The numbers that a script prints; it has two threads on two cores."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", PREPARED + script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """A process on each of some cores that computes without end."""
    script = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", script, str(core)]) for core in cores]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_machine_is_busy_until_nobody_has_waited_for_some_seconds() -> None:
    watch = SpinWatch()
    assert not watch.busy(BUSY, now=100.0)
    assert watch.busy(BUSY + 0.01, now=101.0)
    assert watch.busy(0.0, now=101.0 + QUIET_S - 0.1)
    # With short spins threads wait less: that alone does not make it quiet.
    assert watch.busy(QUIET + 0.01, now=101.0 + QUIET_S - 0.05)
    assert watch.busy(0.0, now=105.0 + QUIET_S - 0.1)
    assert not watch.busy(QUIET + 0.01, now=200.0)
    # A thread that ends takes its waits along.
    assert not watch.busy(-5.0, now=201.0)


@two_cores
def test_waiting_for_a_core_is_seen() -> None:
    with busy(CORES[:1]):
        (waited,) = answers(f"""
os.sched_setaffinity(0, {{{CORES[0] if CORES else 0}}})
before, until = spin_waits.waited_s(), time.monotonic() + 2
while time.monotonic() < until: pass
print(spin_waits.waited_s() - before)
""")
    assert 0.4 < waited < 2.5


@two_cores
def test_a_torch_that_is_half_imported_has_no_threads_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    half = ModuleType("torch")
    half.__file__ = torch.__file__
    monkeypatch.setitem(sys.modules, "torch", half)
    assert spin_waits.spare_threads() is None


def test_spare_threads_end_the_spinning_and_go_again() -> None:
    """Seconds of computing for forty small operations, most of which are spent waiting for the next one."""
    before, held, after, spare = answers("""
if spin_waits._libgomp() is None:
    print("0 0 0 0"); sys.exit()
def seconds():
    started = time.process_time()
    for _ in range(40):
        ones.add_(1); time.sleep(0.01)
    return time.process_time() - started
ones.add_(1); tasks = len(os.listdir("/proc/self/task"))
first = seconds()
spare = spin_waits.spare_threads()
assert len(os.listdir("/proc/self/task")) > tasks
second = seconds()
spare.release()
print(first, second, seconds(), 1)
""")
    if not spare:
        pytest.skip("torch waits in another way here")
    assert held < before / 3 and held < after / 3


@two_cores
@pytest.mark.parametrize("crowded", [True, False])
def test_they_are_held_while_others_want_the_cores(crowded: bool) -> None:
    """Who is alone on the machine cannot be known here; who has one thread waits for none of his own."""
    with busy(CORES if crowded else []):
        most, left, spare = answers(f"""
spin_waits.INTERVAL_S = 0.1
made = []
def counted(original=spin_waits.spare_threads):
    made.append(original())
    return made[-1]
spin_waits.spare_threads = counted
torch.set_num_threads(2 if {crowded} else 1)
until = time.monotonic() + 3
with spin_waits.short_spins_when_busy():
    while time.monotonic() < until and not (made and made[0]):
        ones.add_(1)
alive = [one for one in made if one and one._thread.is_alive()]
print(sum(one is not None for one in made), len(alive), int(spin_waits._libgomp() is not None))
""")
    assert left == 0
    assert most == (crowded and spare)


@linux
def test_the_waits_of_this_process_can_be_read() -> None:
    first = waited_s()
    assert first >= 0 and waited_s() >= first - 1


def test_a_run_looks_after_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    @contextmanager
    def recorded() -> Iterator[None]:
        looked.append("begun")
        yield
        looked.append("ended")

    def refuse(*unused: Any, **also: Any) -> None:
        assert looked == ["begun"]

    monkeypatch.setattr(engine, "short_spins_when_busy", recorded)
    monkeypatch.setattr(engine, "_run_all", refuse)
    monkeypatch.setattr(engine, "_warn_of_harm", refuse)
    recipe = load_recipe("quickstart", [f"output_dir={tmp_path / 'run'}"])
    stages = [engine.replace(stage, check=lambda context: None) for stage in STAGES]
    engine.run_pipeline(recipe, stages=stages)
    assert looked == ["begun", "ended"]


def test_where_the_kernel_tells_nothing_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin_waits, "_readable", lambda: False)
    monkeypatch.setattr(spin_waits, "_watch", lambda ended: pytest.fail("looked"))
    with spin_waits.short_spins_when_busy():
        pass
