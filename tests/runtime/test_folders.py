"""Removing what others left: any depth, closed folders, and links without what they lead to."""

from __future__ import annotations

import os
from pathlib import Path

from limbeck.runtime.files import whole_file, whole_folder
from limbeck.runtime.folders import partial_in, remove
from limbeck.runtime.rundir import RunDirectory


def nest(folder: Path, depth: int, name: str = "a") -> None:
    """Folders inside each other, a file in each; step by step, for the last one's path may be too long."""
    folder.mkdir(parents=True)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_any_depth(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    nest(run.scores / ".sandbox.partial", 3000)
    nest(run.scores / ".other.partial", 200, "long" * 50)
    run.remove_partial_files()
    assert list(run.scores.iterdir()) == []


def test_closed_folders(tmp_path: Path) -> None:
    nest(tmp_path / "x", 3)
    (tmp_path / "x/a/a").chmod(0)
    (tmp_path / "x/a").chmod(0)
    remove(tmp_path / "x")
    remove(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_links_alone(tmp_path: Path) -> None:
    run, mine = RunDirectory(tmp_path / "run"), tmp_path / "mine"
    nest(mine, 1)
    run.root.mkdir()
    for name in (".a.partial", ".b.txt.partial", "seen"):
        (run.root / name).symlink_to(mine, target_is_directory=True)
    (run.root / ".c.partial").mkdir()
    (run.root / ".c.partial" / "inner").symlink_to(mine)
    (mine / ".d.partial").write_text("mine")
    assert {path.name for path in partial_in(run.root)} == {".a.partial", ".b.txt.partial", ".c.partial"}
    run.remove_partial_files()
    assert [path.name for path in run.root.iterdir()] == ["seen"]
    assert sorted(path.name for path in mine.iterdir()) == [".d.partial", "a", "file"]


def test_writing_past_a_link(tmp_path: Path) -> None:
    """A link under the scratch name would have somebody else's file written."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    (run / ".a.partial").symlink_to(mine)
    (run / ".b.partial").symlink_to(tmp_path, target_is_directory=True)
    with whole_file(run / "a") as partial:
        partial.write_text("new")
    with whole_folder(run / "b") as partial:
        (partial / "c").write_text("new")
    assert mine.read_text() == "mine" and not (run / "a").is_symlink() and not (run / "b").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]
