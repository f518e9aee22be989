"""The lock of a folder: one process at a time. It dies with its process, so a kill never leaves it behind."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from limbeck.runtime.files import a_folder, naming
from limbeck.types import LimbeckError


@contextmanager
def exclusive(folder: Path, *, remedy: str, warn: Callable[[str], Any], who: str = "process") -> Iterator[None]:
    """A block in which no other process has the folder; it is made where there is none.

    Args:
        remedy: what to do while another one has it.
        warn: called where the file system has no locks.
        who: what kind of process has it, in messages.

    Raises:
        LimbeckError: another one has it; names its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _open_lock(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "starting"
            raise LimbeckError(f"{folder} is in use by another {who} ({holder}); {remedy}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            warn(f"the file system of {folder} has no locks; make sure that no second {who} uses it")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        with naming(folder):
            yield


def _open_lock(path: Path) -> IO[str]:
    """Open the lock file; a link is refused, since another file would be overwritten through it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise a_folder(path) from None
        if error.errno != errno.ELOOP:
            raise
        raise LimbeckError(
            f"{path} is a link; expected a plain file: delete it and run the same command again"
        ) from None
    return os.fdopen(descriptor, "r+", encoding="utf-8")
