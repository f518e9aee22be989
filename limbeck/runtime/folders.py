"""Removing folders as a killed or sandboxed program may leave them: nested beyond recursion, closed, with links."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path


def remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to), or a folder with all that is in it, however deep."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        path.unlink(missing_ok=True)
        return
    # Folders two levels down move up one by one, so that neither the stack nor a path grows with the depth.
    while entries := _opened(path):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            for inner in _opened(entry.path):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                    os.rename(inner.path, path / f".{uuid.uuid4().hex}")
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
    path.rmdir()


def _opened(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, whatever its permissions were."""
    with contextlib.suppress(PermissionError):
        os.chmod(folder, 0o700)
    with os.scandir(folder) as entries:
        return list(entries)


def partial_in(root: Path) -> Iterator[Path]:
    """Half-written files below a folder, by their name `.NAME.partial`; links are not followed."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        with contextlib.suppress(PermissionError, FileNotFoundError), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") and entry.name.endswith(".partial"):
                    yield folder / entry.name
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(folder / entry.name)
