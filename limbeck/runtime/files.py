"""Files and folders that are written whole or not at all, so that a kill at any time leaves none half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.runtime.folders import remove
from limbeck.types import LimbeckError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the path in errors of the disk inside the block; the system names only files that it cannot open."""
    try:
        yield
    except Exception as error:
        # safetensors has an error of its own, with the system's number in its text.
        of_the_disk = getattr(error, "errno", None) in _DISK or "os error" in str(error)
        if of_the_disk and getattr(error, "filename", None) is None:
            error.filename = str(path)  # pyright: ignore[reportAttributeAccessIssue]
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file that becomes `path`, on disk, when the block ends without an error, and vanishes with one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            # What a kill left, or a link, through which another file would be written.
            remove(partial)
            if path.is_dir():
                raise a_folder(path)
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            _settle(partial, mode)
        partial.replace(path)
    finally:
        # On a full disk half a file would take the room that the next one needs.
        partial.unlink(missing_ok=True)


def _settle(file: Path, mode: int) -> None:
    """Force a file to disk, and give it the permissions of its neighbours: safetensors writes 0600."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


def a_folder(path: Path) -> LimbeckError:
    return LimbeckError(f"{path} is a folder where a file belongs; delete it and run the same command again")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, also after a crash."""
    with whole_file(path) as partial:
        partial.write_text(text, "utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except IsADirectoryError:
        raise a_folder(path) from None
    except (ValueError, RecursionError) as error:
        raise LimbeckError(f"{path} is damaged ({error}); delete it and run the same command again") from None


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends without an error, and vanishes with one.

    A folder that was there before is kept under another name until the new one is in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    partial.mkdir()
    try:
        with naming(path):
            yield partial
            mode = stat.S_IMODE(partial.stat().st_mode) & 0o666
            for file in partial.rglob("*"):
                if file.is_file():
                    _settle(file, mode)
        replaced = path.with_name(f".{path.name}.replaced.partial")
        remove(replaced)
        if path.exists():
            path.replace(replaced)
        partial.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Files that grow by lines in place: a second name for one of them would change with it.
APPENDED = ("metrics.jsonl", "metrics.sft.jsonl", "examples.jsonl", "served.jsonl")


def link(path: Path, target: Path) -> None:
    """Give a file a second name (a hard link), in place of what has it; a copy for logs and where links are impossible.

    Safe because everything else in a run directory is replaced, never written in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    if path.name in APPENDED:
        shutil.copyfile(path, partial)
    else:
        try:
            partial.hardlink_to(path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS):
                raise
            shutil.copyfile(path, partial)
    partial.replace(target)
    # Of two names of one file, a move of the first onto the second does nothing at all.
    partial.unlink(missing_ok=True)
