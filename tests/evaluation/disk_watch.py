"""How much programs hold on disk while they run in the sandbox, looked at without a pause. A command of its own:

    python -m tests.evaluation.disk_watch SCRATCH [NAME ...] -> JSON, attack by attack

It mounts a file system over SCRATCH for itself alone. There even a file without a name is seen, in the figures of that
file system, and as its owner it sees into the mounts of the programs as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.evaluation.sandbox import host, tmpfs
from limbeck.evaluation.sandbox.host import Job, Limits
from tests.evaluation.sandbox_attacks import ENDLESS
from tests.evaluation.sandbox_disk_attacks import DISK

LIMITS = Limits(memory_mb=128, file_mb=1, folder_mb=8, folder_entries=200, timeout_s=20.0)
_ROOM_MB = 256
_TESTS = "assert add(1, 2) == 3\n"


@dataclass(kw_only=True)
class Peak:
    """The most at any look: bytes of the disk, and of the program's own mount, its entries, KiB of the process."""

    disk: int = 0
    own: int = 0
    entries: int = 0
    process_kb: int = 0
    both_kb: int = 0
    looks: int = 0

    def look(self, scratch: Path, started: list[subprocess.Popen[bytes]]) -> None:
        self.looks += 1
        self.disk = max(self.disk, _held(str(scratch))[0])
        for process in started:
            try:
                mounted = f"/proc/{process.pid}/root{process.args[-3]}"  # pyright: ignore
                if os.stat(mounted).st_dev == os.stat(scratch).st_dev:
                    continue
                held, entries = _held(mounted)
                found = re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            except OSError:
                continue
            self.own, self.entries = max(self.own, held), max(self.entries, entries)
            if found:
                self.process_kb = max(self.process_kb, int(found[1]))
                self.both_kb = max(self.both_kb, int(found[1]) + held // 1024)


def _held(path: str) -> tuple[int, int]:
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree


def watch(scratch: Path, program: str, limits: Limits, started: list[subprocess.Popen[bytes]]) -> dict[str, Any]:
    """The verdict on a program, and the most that was held while it ran."""
    peak, job = Peak(), Job(program=program, setup="", names=("add",), tests=_TESTS)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(host.run_program, job, limits, scratch)
        while not running.done():
            peak.look(scratch, started)
            time.sleep(0.0002)
    started.clear()
    return vars(peak) | {"kind": running.result().kind, "text": running.result().text, "left": os.listdir(scratch)}


def main() -> None:
    scratch, names = Path(sys.argv[1]), sys.argv[2:] or list(DISK)
    tmpfs.mount(str(scratch), size_mb=_ROOM_MB, entries=20000)
    started: list[subprocess.Popen[bytes]] = []

    class Seen(subprocess.Popen):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__(command, **options)
            if "sandbox.candidate" in command[6]:
                started.append(self)

    host.subprocess.Popen = Seen
    found = {}
    for name in names:
        program, kinds = DISK[name]
        limits = replace(LIMITS, timeout_s=1.0) if kinds & ENDLESS == ENDLESS else LIMITS
        found[name] = watch(scratch, program.replace("{cwd!r}", repr(str(scratch))), limits, started)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
