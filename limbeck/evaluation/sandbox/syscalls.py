"""The system calls that a confined interpreter keeps, as a seccomp filter. Everything else fails with EPERM.

A list of what is allowed, not of what is denied: a call that a later kernel brings is denied too. Among what is absent:
clone, fork, execve (no process, no thread), socket, kill and its kin, ptrace, mount, setrlimit, chmod, link, symlink,
memfd_create, io_uring. Standard library alone: the confined interpreter itself imports this.
"""

from __future__ import annotations

import struct

# name: number on x86-64, number on aarch64 (None where that machine has no such call).
ALLOWED_SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup3": (292, 24), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "exit_group": (231, 94), "uname": (63, 160), "fsync": (74, 82), "ftruncate": (77, 46), "getcwd": (79, 17),
    "chdir": (80, 49), "umask": (95, 166), "gettimeofday": (96, 169), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "gettid": (186, 178), "sigaltstack": (131, 132), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "renameat2": (316, 276), "readlinkat": (267, 78), "faccessat": (269, 48),
    "faccessat2": (439, 439), "statx": (332, 291), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "getrandom": (318, 278), "rseq": (334, 293),
    "stat": (4, None), "lstat": (6, None), "poll": (7, None), "access": (21, None), "select": (23, None),
    "dup2": (33, None), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "unlink": (87, None),
    "readlink": (89, None), "getrlimit": (97, None), "arch_prctl": (158, None), "time": (201, None),
}  # fmt: skip

# Calls that are allowed with some arguments only.
_IOCTL, _FCNTL, _OPENAT, _PRLIMIT = (16, 29), (72, 25), (257, 56), (302, 261)
# TCGETS (is it a terminal?), FIONCLEX, FIOCLEX. TIOCSTI would type into a terminal.
_IOCTL_COMMANDS = (0x5401, 0x5450, 0x5451)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. F_SETOWN would have signals sent to others.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
# O_TRUNC, and the bits that say how a file is opened: before its third version Landlock lets O_RDONLY | O_TRUNC pass.
_TRUNCATE, _ACCESS_MODE = 0o1000, 0o3

# machine: its place in the pairs above, its audit number (linux/audit.h).
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Instructions of classic BPF (linux/filter.h): load a word, and it, compare it, return.
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_PASS, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
# Where seccomp_data has the number, the machine and the six arguments.
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16

_Instruction = tuple[int, int, int, int]


def program(machine: str) -> bytes:
    """The filter as BPF for a machine of `MACHINES`: struct sock_filter after struct sock_filter."""
    place, audit = MACHINES[machine]
    code: list[_Instruction] = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, audit), _give(_KILL), (_LOAD, 0, 0, _NUMBER)]
    for numbers in ALLOWED_SYSCALLS.values():
        number = numbers[place]
        if number is not None:
            code += _when(number, [_give(_PASS)])
    code += _when(_IOCTL[place], _one_of(1, _IOCTL_COMMANDS))
    code += _when(_FCNTL[place], _one_of(1, _FCNTL_COMMANDS))
    # Limits may be read, never set: the third argument is where the new ones would lie.
    code += _when(_PRLIMIT[place], [*_require(2, 0, high=True), *_require(2, 0), _give(_PASS)])
    truncating = [(_LOAD, 0, 0, _ARGUMENTS + 16), (_AND, 0, 0, _TRUNCATE | _ACCESS_MODE)]
    code += _when(_OPENAT[place], [*truncating, (_EQUAL, 0, 1, _TRUNCATE), _give(_REFUSE), _give(_PASS)])
    code.append(_give(_REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _give(verdict: int) -> _Instruction:
    return (_RETURN, 0, 0, verdict)


def _when(number: int, body: list[_Instruction]) -> list[_Instruction]:
    """Instructions for one system call. They end in a return: what follows expects the number to be loaded still."""
    return [(_EQUAL, 0, len(body), number), *body]


def _one_of(argument: int, values: tuple[int, ...]) -> list[_Instruction]:
    code: list[_Instruction] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
    for value in values:
        code += [(_EQUAL, 0, 1, value), _give(_PASS)]
    return [*code, _give(_REFUSE)]


def _require(argument: int, value: int, *, high: bool = False) -> list[_Instruction]:
    """Refuse unless the low (or high) half of an argument is `value`."""
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument + 4 * high), (_EQUAL, 1, 0, value), _give(_REFUSE)]
