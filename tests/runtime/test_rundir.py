"""The run directory: whole files or none, one run at a time, and nothing finished is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from limbeck.runtime import rundir
from limbeck.runtime.rundir import (
    RunDirectory,
    fingerprint,
    flatten,
    read_json,
    read_sealed,
    sealed,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)
from limbeck.types import LimbeckError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=8
)


@given(st.dictionaries(st.text(), JSON))
def test_fingerprint_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert fingerprint(value) == fingerprint(turned)
    assert fingerprint(value) != fingerprint({**value, "one more \x00": 1})


class TestWriting:
    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file.txt"
        write_text(path, "old")

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(rundir.os, "fsync", full)
        with pytest.raises(OSError, match="No space") as caught:
            write_text(path, "new")
        assert caught.value.filename == str(path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "file.json"
        path.write_text('{"a": ')
        with pytest.raises(LimbeckError, match=r"file\.json is damaged"):
            read_json(path)

    def test_a_folder_in_the_place_of_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file.json"
        path.mkdir()
        for use in (lambda: write_json(path, {}), lambda: read_json(path)):
            with pytest.raises(LimbeckError, match=r"file\.json is a folder where a file belongs; delete it"):
                use()
        path.rename(tmp_path / ".lock")
        with pytest.raises(LimbeckError, match="is a folder"), RunDirectory(tmp_path).locked(print):
            pass

    def test_folder_appears_whole_and_replaces(self, tmp_path: Path) -> None:
        target = tmp_path / "step"
        for content in ("first", "second"):
            with whole_folder(target) as partial:
                (partial / "a").write_text(content)
                assert not target.exists() or (target / "a").read_text() == "first"
            assert (target / "a").read_text() == content
        assert list(tmp_path.iterdir()) == [target]

    def test_folder_vanishes_with_an_error(self, tmp_path: Path) -> None:
        target = tmp_path / "step"
        with whole_folder(target) as partial:
            (partial / "a").write_text("good")
        with pytest.raises(RuntimeError, match="half way"), whole_folder(target) as partial:
            (partial / "a").write_text("half")
            raise RuntimeError("half way")
        assert (target / "a").read_text() == "good"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
    def test_everything_follows_the_umask(self, tmp_path: Path, umask: int, mode: int) -> None:
        """Also what safetensors writes, which by itself is for its owner alone."""
        from safetensors.torch import save_file

        before = os.umask(umask)
        try:
            with whole_folder(tmp_path / "step") as partial:
                (partial / "inner").mkdir()
                save_file({"a": torch.zeros(3)}, partial / "inner" / "a.safetensors")
                write_json(partial / "state.json", {})
            with whole_file(tmp_path / "b.safetensors") as partial:
                save_file({"a": torch.zeros(3)}, partial)
        finally:
            os.umask(before)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
        assert modes == dict.fromkeys(("a.safetensors", "state.json", "b.safetensors"), mode)

    def test_a_full_disk_names_what_was_written(self, tmp_path: Path) -> None:
        full = errno.ENOSPC
        run = RunDirectory(tmp_path / "run")
        with pytest.raises(OSError, match="No space") as caught, run.locked(print):
            raise OSError(full, os.strerror(full))
        assert caught.value.filename == str(run.root)
        with pytest.raises(OSError, match="No space") as caught, run.locked(print), whole_folder(run.student):
            raise OSError(full, os.strerror(full))
        assert caught.value.filename == str(run.student)
        with pytest.raises(SafetensorError) as wrapped, whole_file(run.root / "a"):
            raise SafetensorError(f"I/O error: {os.strerror(full)} (os error {full})")
        assert getattr(wrapped.value, "filename", None) == str(run.root / "a")
        with pytest.raises(OSError, match="refused") as caught, run.locked(print):
            raise OSError(errno.ECONNREFUSED, "refused")
        assert caught.value.filename is None


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


class TestSealing:
    def test_as_written(self, tmp_path: Path) -> None:
        record = {"a": 0.1 + 0.2, "b": {"10": None, 9: ["x", 1e300]}, "check": "old"}
        write_json(tmp_path / "a.json", sealed(record))
        assert read_sealed(tmp_path / "a.json") == {"a": 0.1 + 0.2, "b": {"10": None, "9": ["x", 1e300]}}

    @pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "{", "[" * 9000, '{"check": 1}', "\x80"])
    def test_something_else(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.json").write_text(text, "latin-1")
        with pytest.raises(LimbeckError, match=r"a\.json is damaged .*; delete it and run the same command again"):
            read_sealed(tmp_path / "a.json")

    def test_another_value(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", sealed({"a": 1, "b": 2}) | {"b": 3})
        with pytest.raises(LimbeckError, match="it is not what was written"):
            read_sealed(tmp_path / "a.json")


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


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
