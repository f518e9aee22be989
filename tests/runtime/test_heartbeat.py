"""Ranks wait as long as the first one lives, and no longer."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from limbeck.runtime import heartbeat
from limbeck.runtime.heartbeat import beating, wait_until
from limbeck.types import LimbeckError


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heartbeat.LIMIT_S == 60 and heartbeat.INTERVAL_S < 10
    monkeypatch.setattr(heartbeat, "LIMIT_S", 1.0)
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.1)
    monkeypatch.setattr(heartbeat, "_POLL_S", 0.02)


def test_a_slow_stage_is_waited_for(tmp_path: Path) -> None:
    """Four times as long as a rank waits for a sign."""
    began, sign = time.monotonic(), tmp_path / "run" / ".lock"
    with beating(sign):
        wait_until(lambda: time.monotonic() - began > 4, sign=sign, rank=1)
    assert time.monotonic() - began > 4


def test_a_first_rank_that_has_ended_is_not(tmp_path: Path) -> None:
    sign, done = tmp_path / ".lock", threading.Event()

    def first() -> None:
        with beating(sign):
            time.sleep(0.5)
        done.set()

    thread = threading.Thread(target=first)
    thread.start()
    with pytest.raises(LimbeckError, match=r"rank 3 has seen no sign of rank 0 in .* start the same command again"):
        wait_until(lambda: False, sign=sign, rank=3)
    assert done.is_set()
    thread.join()


def test_a_first_rank_that_ended_just_before_is_not_taken_for_one_elsewhere(tmp_path: Path) -> None:
    sign = tmp_path / ".lock"
    sign.touch()
    with pytest.raises(LimbeckError, match=r"rank 1 has seen no sign of rank 0 in .* start the same command again"):
        wait_until(lambda: False, sign=sign, rank=1)


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_that_is_not_the_first_ranks_own(there: bool, tmp_path: Path) -> None:
    """None, or one of an earlier run."""
    sign = tmp_path / "run" / ".lock"
    if there:
        sign.parent.mkdir()
        sign.touch()
        # A clock that goes ahead is no sign of life.
        os.utime(sign, (time.time() + 1e6, time.time() + 1e6))
    began = time.monotonic()
    with pytest.raises(LimbeckError, match=r"rank 1 does not see rank 0 work in .*; all ranks need the same run dir"):
        wait_until(lambda: False, sign=sign, rank=1)
    assert 1 <= time.monotonic() - began < 3


def test_what_is_there_needs_no_sign(tmp_path: Path) -> None:
    wait_until(lambda: True, sign=tmp_path / ".lock", rank=1)


def test_a_disk_that_takes_no_sign_ends_nothing(tmp_path: Path) -> None:
    with beating(tmp_path / "run" / ".lock"):
        # A sign may come between the removal of the lock and that of its folder.
        while (tmp_path / "run").exists():
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        time.sleep(0.3)
