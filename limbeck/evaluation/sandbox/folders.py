"""The directory a program may write to: whether it grew too large, and its removal whatever lies in it."""

from __future__ import annotations

import os
from pathlib import Path


def larger_than(folder: Path, *, entries: int, size: int) -> bool:
    """Whether more than `entries` files and directories lie in a directory, or more than `size` bytes.

    A directory that cannot be read counts as too large: it was made so to hide what it holds.
    """
    found, total, waiting = 0, 0, [str(folder)]
    while waiting:
        try:
            for entry in list(os.scandir(waiting.pop())):
                found += 1
                total += entry.stat(follow_symlinks=False).st_size
                if found > entries or total > size:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
        except FileNotFoundError:
            # The program is at work and has just removed it.
            continue
        except OSError:
            return True
    return False


def remove(folder: Path) -> None:
    """Remove a directory, however deep and whatever its modes. Recursion and the length of a path both have an end."""
    here = os.open(folder, os.O_RDONLY)
    names: list[str] = []
    left = [_without_files(here)]
    while left:
        if left[-1]:
            names.append(left[-1].pop())
            os.chmod(names[-1], 0o700, dir_fd=here)
            here = _moved(here, names[-1])
            left.append(_without_files(here))
        else:
            left.pop()
            if names:
                here = _moved(here, os.pardir)
                os.rmdir(names.pop(), dir_fd=here)
    os.close(here)
    os.rmdir(folder)


def _without_files(directory: int) -> list[str]:
    """Remove the files of a directory; the names of the directories in it."""
    with os.scandir(directory) as found:
        entries = list(found)
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=directory)
    return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _moved(directory: int, name: str) -> int:
    there = os.open(name, os.O_RDONLY, dir_fd=directory)
    os.close(directory)
    return there
