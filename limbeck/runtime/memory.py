"""Peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def reset_peak_memory() -> None:
    """Start a new high-water mark, so that each stage has its own (Linux; elsewhere the process's mark is kept)."""
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
