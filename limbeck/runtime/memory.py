"""Memory of this process and of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from typing import Any


def reset_peak_memory() -> None:
    """Start a new high-water mark, so that each stage has its own (Linux; elsewhere the process's mark is kept)."""
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mib() -> int:
    """High-water mark of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024) if sys.platform == "darwin" else peak // 1024


def peak_device_memory_mib() -> int:
    """High-water mark of what this process's tensors took on its CUDA device; 0 where it uses none."""
    cuda = _cuda()
    return 0 if cuda is None else cuda.max_memory_allocated() // 2**20


def machine_memory() -> int:
    """Bytes that the processes of this machine have together, or those of a container that is given less."""
    import psutil

    found = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(limit).read_text("ascii")))
    return found


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def give_back_freed() -> None:
    """Give the system the memory of freed tensors, of which glibc keeps gigabytes: all up to 32 MiB, once it freed one.

    Called where something large is over (a stage, a first training, a model): what is used again is faulted in anew.
    Other C libraries have no such call, and Windows no such library.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cuda() -> Any:
    """torch.cuda where this process has used it; asking must neither import torch nor start a context."""
    cuda = sys.modules.get("torch.cuda")
    return cuda if cuda is not None and cuda.is_initialized() else None
