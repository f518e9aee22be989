"""Work that ranks share by files: each unit once, for this launch alone, and no wait for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from limbeck.runtime import heartbeat, shared_work
from limbeck.runtime.heartbeat import beating
from limbeck.runtime.shared_work import EVERYTHING, Job, OneProcess, SharedWork
from limbeck.types import LimbeckError

UNITS = range(12)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.02)
    monkeypatch.setattr(heartbeat, "LIMIT_S", 0.5)
    monkeypatch.setattr(heartbeat, "_POLL_S", 0.01)


class Ranks:
    """Two ranks in one process, which give signs as two processes do."""

    def __init__(self, root: Path, stack: ExitStack):
        signs = [root / ".lock", root / ".ranks" / "1"]
        self.first = SharedWork(root=root / ".ranks", rank=0, signs={1: signs[1]})
        self.second = SharedWork(root=root / ".ranks", rank=1, signs={0: signs[0]})
        stack.enter_context(beating(signs[0]))
        self.life = ExitStack()
        stack.enter_context(self.life)
        self.life.enter_context(beating(signs[1], below=root, text=self.second.name))


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    with ExitStack() as stack:
        yield Ranks(tmp_path, stack)


def taken(ranks: Ranks, kinds: tuple[str, ...] = ("write",)) -> Job:
    """The job that the second rank finds."""
    while (job := ranks.second.next(kinds)) is None:
        time.sleep(0.005)
    return job


def done_by(job: shared_work.Share) -> list[int]:
    own = []
    for unit in UNITS:
        if job.take(unit):
            job.step()
            time.sleep(0.005)
            own.append(unit)
            job.finish(unit)
    return own


def test_each_unit_is_done_once_and_nothing_of_the_job_stays(ranks: Ranks) -> None:
    found: list[list[int]] = []
    other = threading.Thread(target=lambda: found.append(done_by(taken(ranks))))
    other.start()
    with ranks.first.posted("write", {"a": 1}, lambda folder: (folder / "more").touch()) as share:
        time.sleep(0.2)
        own = done_by(share)
        share.wait()
        assert all(share.finished(unit) for unit in UNITS)
    other.join()
    assert sorted(own + found[0]) == list(UNITS) and found[0]
    assert not list(ranks.first.folder.iterdir()) and ranks.second.next(("write",)) is None


def test_a_job_is_seen_once_with_its_fields_and_by_those_that_do_such_work(ranks: Ranks) -> None:
    with ranks.first.posted("write", {"a": [1, "b"]}, lambda folder: (folder / "more").write_text("x")):
        assert ranks.second.next(("score",)) is None
        job = taken(ranks)
        assert (job.kind, job.fields, (job.folder / "more").read_text()) == ("write", {"a": [1, "b"]}, "x")
        assert ranks.second.next(("write",)) is None
        assert not job.joins
    assert not job.take(3)
    job.finish(3)


def test_a_job_that_a_killed_launch_has_left_is_not_taken_up(ranks: Ranks, tmp_path: Path) -> None:
    with ranks.first.posted("write", {}) as share:
        assert share.take(0)
        late = SharedWork(root=tmp_path / ".ranks", rank=1, signs={})
        assert late.next(("write",)) is None
    # The next one finds the folder of a launch that was killed, with a unit that a rank had taken.
    left = ranks.first.folder / "000001"
    left.mkdir()
    (left / "job.json").write_text('{"kind": "write", "fields": {}, "for": ["another"]}')
    (left / "000000").write_text("1")
    again = SharedWork(root=tmp_path / ".ranks", rank=0, signs=ranks.first.signs)
    with again.posted("write", {"now": True}) as share:
        assert taken(ranks).fields == {"now": True} and share.take(0)


def test_a_rank_that_has_ended_is_named(ranks: Ranks) -> None:
    with ranks.first.posted("write", {}) as share:
        assert taken(ranks).take(7)
        ranks.life.close()
        with pytest.raises(LimbeckError, match=r"no sign of rank 1 for 0 s \(it has batch 7 of the work 'write'\)"):
            share.wait()


def test_a_rank_that_lives_and_hangs_is_named(ranks: Ranks, monkeypatch) -> None:
    monkeypatch.setattr(shared_work, "STALL_S", 0.3)
    monkeypatch.setattr(shared_work, "_TOUCH_S", 0.0)
    with ranks.first.posted("write", {}) as share:
        job = taken(ranks)
        assert job.take(2)
        went_on = time.monotonic()
        steps = threading.Thread(target=lambda: [(time.sleep(0.05), job.step()) for _ in range(12)])
        steps.start()
        with pytest.raises(LimbeckError, match="rank 1 lives and has not gone on for 0 s"):
            share.wait()
        # Not while it went on.
        assert time.monotonic() - went_on > 0.6
        steps.join()


def test_a_rank_that_never_came_is_named_before_anything_is_posted(ranks: Ranks) -> None:
    ranks.life.close()
    with pytest.raises(LimbeckError, match="rank 0 has seen no sign of rank 1"), ranks.first.posted("write", {}):
        pass
    assert not ranks.first.folder.exists()


def test_one_process_does_all() -> None:
    with OneProcess().posted("write", {}) as share:
        assert share is EVERYTHING and done_by(share) == list(UNITS) and share.joins
        share.wait()
