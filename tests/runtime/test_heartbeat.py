"""Ranks wait as long as the first one lives, and no longer."""

from __future__ import annotations

import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from limbeck.runtime import heartbeat
from limbeck.runtime.heartbeat import LastWord, beating, leaving_word, said_by_the_first_rank, wait_until
from limbeck.types import LimbeckError, SaidElsewhere


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heartbeat.LIMIT_S == 60 and heartbeat.INTERVAL_S < 10
    monkeypatch.setattr(heartbeat, "LIMIT_S", 1.0)
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.1)
    monkeypatch.setattr(heartbeat, "_POLL_S", 0.02)
    monkeypatch.setattr(heartbeat, "BELIEVED_S", 0.3)
    monkeypatch.setattr(heartbeat, "SAME_S", 0.3)


def test_a_slow_stage_is_waited_for(tmp_path: Path) -> None:
    """Four times as long as a rank waits for a sign."""
    began, sign = time.monotonic(), tmp_path / "run" / ".lock"
    with beating(sign):
        wait_until(lambda: time.monotonic() - began > 4, sign=sign, word=LastWord(tmp_path / "ended"), rank=1)
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
        wait_until(lambda: False, sign=sign, word=LastWord(tmp_path / "ended"), rank=3)
    assert done.is_set()
    thread.join()


def test_a_first_rank_that_ended_just_before_is_not_taken_for_one_elsewhere(tmp_path: Path) -> None:
    sign = tmp_path / ".lock"
    sign.touch()
    with pytest.raises(LimbeckError, match=r"rank 1 has seen no sign of rank 0 in .* start the same command again"):
        wait_until(lambda: False, sign=sign, word=LastWord(tmp_path / "ended"), rank=1)


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
        wait_until(lambda: False, sign=sign, word=LastWord(tmp_path / "ended"), rank=1)
    assert 1 <= time.monotonic() - began < 3


def test_what_is_there_needs_no_sign(tmp_path: Path) -> None:
    wait_until(lambda: True, sign=tmp_path / ".lock", word=LastWord(tmp_path / "ended"), rank=1)


def refused(note: Path, said: str = "no such teacher") -> None:
    with suppress(LimbeckError), leaving_word(note):
        raise LimbeckError(said)


def test_a_first_rank_that_refuses_is_not_waited_for(tmp_path: Path) -> None:
    sign, note = tmp_path / ".lock", tmp_path / ".ranks" / "ended"
    threading.Timer(0.2, refused, [note]).start()
    with beating(sign), pytest.raises(SaidElsewhere, match="rank 0 has ended: no such teacher"):
        wait_until(lambda: False, sign=sign, word=LastWord(note), rank=1)


@pytest.mark.parametrize("age_s", [0, 3600])
def test_a_word_that_was_there_first_is_believed_where_it_is_young_and_stays(tmp_path: Path, age_s: float) -> None:
    note = tmp_path / "ended"
    refused(note)
    written = time.time() - age_s
    os.utime(note, (written, written))
    word = LastWord(note)
    assert not word.left()
    time.sleep(0.4)
    assert word.left() is (age_s == 0)


def test_a_word_of_an_earlier_launch_goes_when_the_first_rank_comes(tmp_path: Path) -> None:
    note = tmp_path / "ended"
    refused(note)
    word = LastWord(note)
    with leaving_word(note):
        time.sleep(0.4)
        assert not word.left()
    refused(note, "another")
    assert word.left() and word.text() == "another"


def test_an_error_that_the_first_rank_says_too_is_said_once(tmp_path: Path) -> None:
    note = tmp_path / "ended"
    word = LastWord(note)
    with pytest.raises(LimbeckError) as caught, said_by_the_first_rank(word):
        raise LimbeckError("mine alone")
    assert type(caught.value) is LimbeckError
    refused(note, "ours")
    with pytest.raises(SaidElsewhere), said_by_the_first_rank(word):
        raise LimbeckError("ours")
    with pytest.raises(LimbeckError) as caught, said_by_the_first_rank(word):
        raise LimbeckError("mine")
    assert type(caught.value) is LimbeckError


def test_a_disk_that_takes_no_sign_ends_nothing(tmp_path: Path) -> None:
    with beating(tmp_path / "run" / ".lock"):
        # A sign may come between the removal of the lock and that of its folder.
        while (tmp_path / "run").exists():
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        time.sleep(0.3)
