"""A directory in memory that the kernel bounds, seen by the process that mounts it alone: its files end with it.

Every page and every inode counts until no process holds it, whether or not it still has a name. So no unlinked file, no
mapping, no hole and no renaming takes a program beyond the limit, at any moment. Standard library alone.
"""

from __future__ import annotations

import ctypes
import os

# linux/sched.h and linux/mount.h.
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_NO_SETUID, _NO_DEVICES, _NO_PROGRAMS, _RECURSIVE, _PRIVATE = 2, 4, 8, 1 << 14, 1 << 18


def mount(folder: str, *, size_mb: int, entries: int) -> None:
    """Put an empty directory over `folder` and work in it.

    Args:
        size_mb: MiB that its files hold together; more fails with ENOSPC.
        entries: files and directories in it; one more fails with ENOSPC.

    Raises:
        OSError: this process may not. It is not to be used then: what it may read can have changed.
    """
    _leave()
    # Without this the mount would be seen by everybody where the mounts are shared, as they are with systemd.
    _mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
    # The root of it is an inode as well.
    options = f"size={size_mb}m,nr_inodes={entries + 1},mode=700".encode()
    _mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS, options)
    # Until now the working directory is what lies below the mount.
    os.chdir(folder)


def _leave() -> None:
    """Leave the mounts of others: within user namespaces as anybody, else as root."""
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_USER | _NEW_MOUNTS) == 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    elif libc.unshare(_NEW_MOUNTS) != 0:
        raise OSError(ctypes.get_errno(), f"mount namespace: {os.strerror(ctypes.get_errno())}")


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int, options: bytes | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, target, kind, ctypes.c_ulong(flags), options) != 0:
        raise OSError(
            ctypes.get_errno(), f"mount of {(kind or b'nothing').decode()}: {os.strerror(ctypes.get_errno())}"
        )
