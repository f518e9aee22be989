"""A server that writes whatever bytes a test orders, at whatever pace."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

Plot = Callable[[str], Iterable[bytes]]
"""From what the client asked, the pieces to send."""

HEAD = b"HTTP/1.1 200 OK\r\n"
# A generator that never ends is stopped when the client hangs up, and never lives longer than this.
_LONGEST_S = 20.0


def whole(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    """A well-formed answer."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def dripped(piece: bytes, before: bytes = b"", pause_s: float = 0.05) -> Plot:
    """The same bytes again and again, slowly."""

    def plot(asked: str) -> Iterator[bytes]:
        del asked
        yield before
        while True:
            yield piece
            time.sleep(pause_s)

    return plot


def poured(piece: bytes, before: bytes = b"") -> Plot:
    """The same bytes again and again, as fast as they go."""
    return dripped(piece, before, 0.0)


def once(*pieces: bytes) -> Plot:
    return lambda asked: pieces


def hung(*pieces: bytes) -> Plot:
    """Some bytes, and then nothing."""

    def plot(asked: str) -> Iterator[bytes]:
        del asked
        yield from pieces
        time.sleep(_LONGEST_S)

    return plot


def reset(asked: str) -> Iterator[bytes]:
    """Half an answer, and then the connection is torn down."""
    del asked
    yield HEAD + b"Content-Length: 100\r\n\r\n{"
    raise ConnectionResetError


@contextmanager
def playing(plot: Plot) -> Iterator[tuple[str, list[str]]]:
    """A running server: its address, and the requests it has read so far."""
    asked: list[str] = []

    def serve(client: socket.socket) -> None:
        with client:
            client.settimeout(5)
            try:
                said = _request(client)
                asked.append(said)
                deadline = time.monotonic() + _LONGEST_S
                for piece in plot(said):
                    client.sendall(piece)
                    if time.monotonic() > deadline:
                        return
            except ConnectionResetError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", asked
        finally:
            listening.shutdown(socket.SHUT_RDWR)


def _request(client: socket.socket) -> str:
    raw = b""
    while b"\r\n\r\n" not in raw and (more := client.recv(1 << 16)):
        raw += more
    head, _, body = raw.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length and (more := client.recv(1 << 16)):
        body += more
    return (head + b"\r\n\r\n" + body).decode("latin-1")
