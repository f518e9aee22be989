"""Content hashes of files, each file read once per process."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# By device, inode, size and time: a second name of a file (a hard link) costs nothing.
_known: dict[tuple[int, int, int, int], str] = {}


def sha256_of(path: str | Path) -> str:
    """Sha256 (hex) of a file's content; a file that is as it was when it was last read is not read again."""
    stat = os.stat(path)
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _known:
        with open(path, "rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]
