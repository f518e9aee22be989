"""What runs share: linked whole, never half, never twice, and never changed by who has it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from limbeck.runtime.artifact_cache import ArtifactCache
from limbeck.runtime.files import link, read_json, write_json, write_text
from limbeck.runtime.outputs import written_below
from limbeck.runtime.rundir import RunDirectory


def finished_run(root: Path, fingerprint_: str = "abc") -> RunDirectory:
    run = RunDirectory(root)
    write_text(run.responses / "batches" / "00000.jsonl", "one\n")
    write_text(run.prompts, "prompts\n")
    write_json(run.manifest_path("respond"), {"fingerprint": fingerprint_, "done": True, "seconds": 3.0})
    return run


def outputs(run: RunDirectory) -> tuple[Path, ...]:
    return (run.responses, run.prompts, run.samples)


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(tmp_path / "sweep" / "shared")


class TestStages:
    def test_adopted_as_links(self, artifacts: ArtifactCache, tmp_path: Path) -> None:
        donor, run = finished_run(tmp_path / "sweep" / "a"), RunDirectory(tmp_path / "sweep" / "b")
        artifacts.publish("respond", "abc", donor)
        assert artifacts.link_stage("respond", "abc", run, outputs) == donor.root
        assert run.finished("respond", "abc") and not run.samples.exists()
        for here, there in zip(outputs(run)[:2], outputs(donor)[:2], strict=True):
            for file in [here] if here.is_file() else [p for p in here.rglob("*") if p.is_file()]:
                assert file.samefile(there / file.relative_to(here) if there.is_dir() else there)
        assert read_json(run.manifest_path("respond"))["shared_from"] == "../a"

    def test_what_another_stage_wrote_among_them_is_left(self, artifacts: ArtifactCache, tmp_path: Path) -> None:
        donor, run = finished_run(tmp_path / "sweep" / "a"), RunDirectory(tmp_path / "sweep" / "b")
        record = (donor.manifest("respond") or {}) | {"outputs": written_below(donor.root, outputs(donor))}
        write_json(donor.manifest_path("respond"), record)
        write_text(donor.responses / "README.md", "a card\n")
        artifacts.publish("respond", "abc", donor)
        assert artifacts.link_stage("respond", "abc", run, outputs) == donor.root
        assert [path.name for path in run.responses.rglob("*") if path.is_file()] == ["00000.jsonl"]
        assert run.prompts.exists()

    def test_a_moved_sweep_still_finds_them(self, artifacts: ArtifactCache, tmp_path: Path) -> None:
        artifacts.publish("respond", "abc", finished_run(tmp_path / "sweep" / "a"))
        (tmp_path / "sweep").rename(tmp_path / "moved")
        moved, run = ArtifactCache(tmp_path / "moved" / "shared"), RunDirectory(tmp_path / "moved" / "b")
        assert moved.link_stage("respond", "abc", run, outputs) == tmp_path / "moved" / "a"

    @pytest.mark.parametrize("change", [{"done": False}, {"fingerprint": "other"}])
    def test_only_what_is_finished_with_these_inputs(
        self, artifacts: ArtifactCache, tmp_path: Path, change: dict
    ) -> None:
        donor, run = finished_run(tmp_path / "sweep" / "a"), RunDirectory(tmp_path / "sweep" / "b")
        artifacts.publish("respond", "abc", donor)
        write_json(donor.manifest_path("respond"), (donor.manifest("respond") or {}) | change)
        assert artifacts.link_stage("respond", "abc", run, outputs) is None and not run.root.exists()
        other = finished_run(tmp_path / "sweep" / "c")
        artifacts.publish("respond", "abc", other)
        assert artifacts.link_stage("respond", "abc", run, outputs) == other.root

    def test_killed_before_any_link(
        self, artifacts: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However far it came, the stage counts as begun, and the next try completes it."""
        donor, run = finished_run(tmp_path / "sweep" / "a"), RunDirectory(tmp_path / "sweep" / "b")
        artifacts.publish("respond", "abc", donor)
        plain, moves = Path.replace, 0

        def replace(self: Path, target: Path) -> Path:
            nonlocal moves
            moves += 1
            if moves == fatal:
                raise KeyboardInterrupt
            return plain(self, target)

        for fatal in range(1, 5):
            moves = 0
            monkeypatch.setattr(Path, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                artifacts.link_stage("respond", "abc", run, outputs)
            monkeypatch.undo()
            assert not run.done("respond")
            assert fatal == 1 or run.manifest("respond") is not None
        artifacts.link_stage("respond", "abc", run, outputs)
        run.remove_partial_files()
        assert run.finished("respond", "abc") and run.prompts.samefile(donor.prompts)
        assert not list(run.root.rglob("*.partial"))


class TestFiles:
    def test_kept_once_and_taken(self, artifacts: ArtifactCache, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        write_text(one / "answers" / "before-1.jsonl", "first\n")
        assert not artifacts.restore("k", two)
        artifacts.store("k", one, [one / "answers" / "before-1.jsonl"])
        write_text(one / "answers" / "before-1.jsonl", "second\n")
        artifacts.store("k", one, [one / "answers" / "before-1.jsonl"])
        assert artifacts.restore("k", two)
        assert (two / "answers" / "before-1.jsonl").read_text() == "first\n"

    def test_replacing_one_name_leaves_the_other(self, artifacts: ArtifactCache, tmp_path: Path) -> None:
        write_text(tmp_path / "a", "old\n")
        link(tmp_path / "a", tmp_path / "b")
        write_text(tmp_path / "b", "new\n")
        assert (tmp_path / "a").read_text() == "old\n"

    def test_logs_are_copied(self, tmp_path: Path) -> None:
        write_text(tmp_path / "metrics.jsonl", "1\n")
        link(tmp_path / "metrics.jsonl", tmp_path / "b" / "metrics.jsonl")
        with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        assert (tmp_path / "metrics.jsonl").read_text() == "1\n"

    def test_copies_where_a_file_can_have_one_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Path, target: Path) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(Path, "hardlink_to", refuse)
        write_text(tmp_path / "a", "text\n")
        link(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "text\n" and not (tmp_path / "b").samefile(tmp_path / "a")

    def test_linked_twice(self, tmp_path: Path) -> None:
        write_text(tmp_path / "a", "text\n")
        for _ in range(2):
            link(tmp_path / "a", tmp_path / "b")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_who_comes_second_waits(artifacts: ArtifactCache) -> None:
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with artifacts.lock("k"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with artifacts.lock("k"):
        inside.set()
        thread.join(0.1)
        assert thread.is_alive()
        with artifacts.lock("another"):
            order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
