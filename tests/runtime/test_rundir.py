"""The run directory: one run at a time, and nothing finished is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from limbeck.runtime.files import read_json, write_json, write_text
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import LimbeckError


class TestLock:
    def test_second_process_is_refused_and_a_kill_releases(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path / "run")
        code = textwrap.dedent("""
            import sys, time
            from pathlib import Path
            from limbeck.runtime.rundir import RunDirectory
            with RunDirectory(Path(sys.argv[1])).locked(print):
                print("locked", flush=True)
                time.sleep(60)
        """)
        with subprocess.Popen([sys.executable, "-c", code, str(run.root)], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            with (
                pytest.raises(LimbeckError, match=f"in use by another run \\(process {other.pid}\\)"),
                run.locked(print),
            ):
                pass
            other.kill()
            other.wait()
        with run.locked(print):
            assert (run.root / ".lock").read_text() == f"process {os.getpid()}"

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        mine, run = tmp_path / "mine", RunDirectory(tmp_path / "run")
        mine.write_text("mine")
        run.root.mkdir()
        (run.root / ".lock").symlink_to(mine)
        with pytest.raises(LimbeckError, match=r"\.lock is a link; .*delete it"), run.locked(print):
            pass
        assert mine.read_text() == "mine"
        (run.root / ".lock").unlink()
        with run.locked(print):
            pass

    def test_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(file: object, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)
        said: list[str] = []
        with RunDirectory(tmp_path).locked(said.append):
            assert len(said) == 1 and "has no locks" in said[0]


def stage(run: RunDirectory, name: str, *, done: bool = True) -> None:
    write_json(run.manifest_path(name), {"stage": name, "fingerprint": "f" * 64, "done": done, "seconds": 1.0})


class TestSettingAside:
    def test_outputs_and_record_move(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        stage(run, "train")
        write_text(run.student / "config.json", "{}")
        write_text(run.metrics, "line\n")
        target = run.set_aside("train", (run.student, run.metrics, run.checkpoints))
        assert target is not None and target.parent == tmp_path / "superseded"
        assert (target / "student" / "config.json").read_text() == "{}"
        assert (target / "metrics.jsonl").read_text() == "line\n"
        assert read_json(target / "train.json")["done"]
        assert not run.student.exists() and not run.metrics.exists() and run.manifest("train") is None

    def test_nothing_there(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        assert run.set_aside("train", (run.student,)) is None
        assert list(tmp_path.iterdir()) == []

    def test_twice_within_a_second(self, tmp_path: Path) -> None:
        run, kept = RunDirectory(tmp_path), set()
        for content in ("first", "second", "third"):
            write_text(run.metrics, content)
            target = run.set_aside("train", (run.metrics,))
            assert target is not None
            kept.add((target / "metrics.jsonl").read_text())
        assert kept == {"first", "second", "third"}

    def test_killed_half_way_is_not_done(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What remains must pass neither for a finished stage nor for the beginning of another."""
        run = RunDirectory(tmp_path)
        stage(run, "train")
        write_text(run.student / "config.json", "{}")
        write_text(run.metrics, "line\n")
        before = Path.replace

        def killed(path: Path, target: Path) -> Path:
            if path == run.metrics:
                raise KeyboardInterrupt
            return before(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                run.set_aside("train", (run.student, run.metrics))
        assert not run.finished("train", "f" * 64)
        assert run.manifest("train") is not None
        assert run.set_aside("train", (run.student, run.metrics)) is not None
        contents = [path.name for path in (tmp_path / "superseded").rglob("*") if path.is_file()]
        assert sorted(contents) == ["config.json", "metrics.jsonl", "train.json", "train.json"]


def test_sweep_removes_what_a_kill_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    whole = [run.prompts, run.responses / "batches" / "00000.jsonl", run.student / "config.json", run.report]
    left = [
        run.root / ".prompts.jsonl.partial",
        run.responses / "batches" / ".00001.safetensors.partial",
        run.checkpoints / ".step-000002.partial" / "model.safetensors",
        run.root / ".student.partial" / "model.safetensors",
        run.root / ".student.replaced.partial" / "model.safetensors",
        run.student / ".README.md.partial",
    ]
    for path in (*whole, *left):
        write_text(path, json.dumps({}))
    run.remove_partial_files()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(whole)
    assert not list(run.root.glob(".student*"))
