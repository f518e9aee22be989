"""A program that reaches for what no program may have, and the tests that it does not get it."""

from __future__ import annotations

NAMES = ("outside", "net", "fill")
PROGRAM = """
import socket

def outside():
    open("/etc/passwd")

def net():
    socket.socket()

def fill(most):
    held, before = 0, -1
    while before < held <= most:
        before = held
        try:
            with open(str(held), "wb", 0) as file:
                while held <= most:
                    held += file.write(bytes(1 << 16))
        except OSError:
            pass
    return held
"""


def tests(most: int) -> str:
    """Tests of `PROGRAM`; `most` is the bytes that its files may hold, 0 where it may write none."""
    attempts = "".join(
        f"try:\n    {call}()\n    raise AssertionError('{call}')\nexcept PermissionError:\n    pass\n"
        for call in ("outside", "net")
    )
    room = f"0 < fill({most}) <= {most}" if most else "fill(1) == 0"
    return f"{attempts}assert {room}, 'more on disk than allowed, or nothing'\n"
