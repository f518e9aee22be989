"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from limbeck.runtime import files
from limbeck.runtime.files import read_json, whole_file, whole_folder, write_json, write_text
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import LimbeckError


class TestWriting:
    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file.txt"
        write_text(path, "old")

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
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
