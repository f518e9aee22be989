"""Errors from outside limbeck (a full disk, too little memory), in one line with their remedy."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.types import LimbeckError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)
_NO_PLACE = (errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn failures of disk and memory inside the block into `LimbeckError`; everything else passes unchanged."""
    try:
        yield
    except Exception as error:
        line = explain(error)
        if line is None or isinstance(error, LimbeckError):
            raise
        raise LimbeckError(line) from error


def explain(error: Exception) -> str | None:
    """The line for an error that a user can correct; None for one that is limbeck's own fault."""
    if isinstance(error, LimbeckError):
        return str(error)
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, MemoryError) or _is_torch_memory_error(error):
        first = " ".join(str(error).split())
        said = f" ({first[:160]})" if first else ""
        return (
            f"out of memory{said}; lower train.per_device_train_batch_size, responses.batch_size or "
            "evaluate.batch_size, or set train.gradient_checkpointing=true, and add --update; nothing finished is lost"
        )
    if is_lost_rank(error):
        return lost_rank_line(error)
    return _explain_safetensors_error(error)


def _explain_os_error(error: OSError) -> str:
    path = error.filename or "a file"
    reason = error.strerror or " ".join(str(error).split())
    if error.errno in _FULL:
        remedy = "free some space, or name another disk with output_dir=...; the same command then continues"
    elif error.errno in _FORBIDDEN:
        remedy = "name a directory you can write to with output_dir=..."
    elif error.errno == errno.EISDIR:
        remedy = "a file belongs there: where it is in the run directory, delete it and run the same command again"
    elif error.errno in _NO_PLACE:
        remedy = "check the path; where it is the run directory, name another with output_dir=..."
    else:
        remedy = "nothing finished is lost; mend it and run the same command again (--debug shows where)"
    return f"cannot use {path}: {reason}; {remedy}"


def _is_torch_memory_error(error: Exception) -> bool:
    """torch's own error on accelerators; on a CPU its allocator raises a plain RuntimeError."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def lost_rank_line(error: Exception, lost: str | None = None) -> str:
    """The line for an exchange between ranks that failed.

    Args:
        lost: the ranks that give no sign of life, in words.
    """
    named = "" if lost is None else f" (no sign of {lost})"
    return (
        f"another rank of this launch has ended or cannot be reached{named} ({' '.join(str(error).split())[:160]}); "
        "look at what it said, and start the same command again: nothing finished is lost"
    )


def is_lost_rank(error: Exception) -> bool:
    """An exchange between ranks that failed: torch's own errors, and the plain ones of gloo."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError) or not torch.distributed.is_available():
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _explain_safetensors_error(error: Exception) -> str | None:
    """safetensors wraps the system's errors in its own type, with the number in the text."""
    from safetensors import SafetensorError

    if not isinstance(error, SafetensorError):
        return None
    if number := re.search(r"os error (\d+)", str(error)):
        code = int(number[1])
        return _explain_os_error(OSError(code, os.strerror(code), getattr(error, "filename", None) or _file_of(error)))
    path, said = _file_of(error), " ".join(str(error).split())
    which = "" if path else " (--debug shows which)"
    return f"{path or 'a .safetensors file'} is damaged ({said}); delete it and run the same command again{which}"


def _file_of(error: Exception) -> str | None:
    """The file that was read or written: safetensors names none, but its caller has the path in a variable."""
    found, trace = None, error.__traceback__
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, str | os.PathLike) and str(value).endswith((".safetensors", ".safetensors.partial")):
                found = str(value)
        trace = trace.tb_next
    return found
