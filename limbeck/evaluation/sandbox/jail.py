"""Confines the interpreter that imports it: limits, no privileges, a few paths (Landlock), a few system calls.

The kernel enforces all of it, for good: nothing that runs later in this process can take it back.
Standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable

from limbeck.evaluation.sandbox import syscalls

# linux/prctl.h and linux/seccomp.h.
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES, _SECCOMP_FILTER = 1, 4, 22, 38, 2
# The same number on both machines: landlock_create_ruleset, landlock_add_rule, landlock_restrict_self.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
# number of seccomp, of capset: x86-64, aarch64.
_SECCOMP, _CAPSET = (317, 277), (126, 91)

# Rights of Landlock (linux/landlock.h): what each version of it can hold back.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE, _MAKE, _REFER = 1 << 4 | 1 << 5, 1 << 7 | 1 << 8, 1 << 13


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(what: str, call: Callable[..., int], *arguments: object) -> int:
    answer = call(*arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return answer


def _syscall(what: str, number: int, *arguments: object) -> int:
    return _checked(what, _libc().syscall, ctypes.c_long(number), *arguments)


def landlock_version() -> int:
    """The version of Landlock in this kernel; 0 where there is none."""
    return max(0, _libc().syscall(ctypes.c_long(_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def missing() -> str:
    """Features that this machine lacks to confine a program, in a few words; empty where nothing is missing."""
    if sys.platform != "linux" or os.uname().machine not in syscalls.MACHINES:
        return f"Linux on {' or '.join(syscalls.MACHINES)} (this is {sys.platform} on {os.uname().machine})"
    refuse = ctypes.c_uint32(0x00050000)
    number = _SECCOMP[syscalls.MACHINES[os.uname().machine][0]]
    lacking = []
    if _libc().syscall(ctypes.c_long(number), ctypes.c_uint(2), ctypes.c_uint(0), ctypes.byref(refuse)) != 0:
        lacking.append("seccomp filters (against network, processes and signals)")
    if landlock_version() == 0:
        lacking.append("Landlock (for the file system; Linux 5.13 or later with landlock in its list of lsm)")
    return " and ".join(lacking)


def confine(*, folder: str | None, memory_mb: int, cpu_s: int, file_mb: int) -> None:
    """Confine this process.

    Args:
        folder: the one directory that it may write to; None for none. The kernel must bound it (`tmpfs`): what lies
            here bounds one file and no more.

    Raises:
        OSError: the kernel refused; the process is not to be used then.
    """
    for name, value in (
        ("RLIMIT_AS", memory_mb << 20), ("RLIMIT_FSIZE", file_mb << 20), ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 64), ("RLIMIT_STACK", 8 << 20), ("RLIMIT_MEMLOCK", 0), ("RLIMIT_MSGQUEUE", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, name), (value, value))
    # The first limit sends SIGXCPU, by which the end is known for what it is; the second one kills.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    prctl = _libc().prctl
    _checked("PR_SET_PDEATHSIG", prctl, _SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    _checked("PR_SET_DUMPABLE", prctl, _SET_DUMPABLE, 0, 0, 0, 0)
    _checked("PR_SET_NO_NEW_PRIVS", prctl, _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _restrict_paths(folder, installation())
    _drop_capabilities()
    code = syscalls.program(os.uname().machine)
    body = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(body)), 16)
    _checked("PR_SET_SECCOMP", prctl, _SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(head), 0, 0)


def installation() -> tuple[str, ...]:
    """Folders of Python and of the libraries that its modules load: what an import has to read."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        libraries = {line.rstrip("\n").rpartition(" ")[2] for line in maps}
    folders = {os.path.dirname(path) for path in libraries if path.startswith("/") and ".so" in path}
    own = os.path.abspath(os.path.join(__file__, *[os.pardir] * 4))
    return (*sorted(folders | {path for path in sys.path if path and path != own}), "/etc/ld.so.cache")


def _restrict_paths(folder: str | None, readable: tuple[str, ...]) -> None:
    version = landlock_version()
    if version == 0:
        raise OSError("this kernel has no Landlock")
    handled = (1 << _RIGHTS[min(version, 5)]) - 1
    # TCP since version 4; signals and abstract sockets of others since version 6. seccomp denies them anyway.
    fields = [handled, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = ctypes.create_string_buffer(struct.pack(f"{len(fields)}Q", *fields), 8 * len(fields))
    rules = _syscall("landlock_create_ruleset", _CREATE, attributes, ctypes.c_size_t(8 * len(fields)), ctypes.c_uint(0))
    for path in readable:
        _grant(rules, path, _READ_FILE | _READ_DIR)
    for path, right in (("/dev/null", _READ_FILE | _WRITE_FILE), ("/dev/urandom", _READ_FILE)):
        _grant(rules, path, right)
    if folder is not None:
        own = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE | _MAKE | _REFER | _TRUNCATE
        _grant(rules, folder, own & handled)
    _syscall("landlock_restrict_self", _RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


def _grant(rules: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        rights &= _READ_FILE | _WRITE_FILE
    below = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, below), 12)
    _syscall("landlock_add_rule", _ADD, ctypes.c_int(rules), ctypes.c_uint(1), rule, ctypes.c_uint(0))
    os.close(below)


def _drop_capabilities() -> None:
    """Root without capabilities is a user like others. Ambient ones go with the permitted ones."""
    number = _CAPSET[syscalls.MACHINES[os.uname().machine][0]]
    version_3 = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    _syscall("capset", number, version_3, ctypes.create_string_buffer(24))
