"""One HTTP request and its reply, or the error instead of it.

Standard library alone: no HTTP package among the dependencies of others bounds a whole answer in time, and they come
and go with those others. A timer that shuts the socket does, whatever is being waited for.
"""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import ip_address
from ssl import SSLCertVerificationError
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

# To reach a server; how long it may take to answer is the caller's business.
CONNECT_S = 10.0
# An answer of 100,000 tokens with everything that servers say of each is smaller.
MAX_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class HttpReply:
    """Reply of a server, whatever its status."""

    status: int
    headers: Message
    raw: bytes


@dataclass(frozen=True, kw_only=True)
class ConnectionFailed:
    """No whole answer: out of reach, a certificate that cannot be verified, too slow, too long, or cut off."""

    kind: Literal["unreachable", "untrusted", "slow", "long", "cut"]
    why: str = ""


def exchange(
    url: str, data: bytes | None, headers: dict[str, str], timeout_s: float, max_bytes: int | None = None
) -> HttpReply | ConnectionFailed:
    """Send a request (POST where there is data) and read the whole answer.

    Every status is an answer: errors are read, and no redirect is followed, which might carry a key to another host.

    Args:
        timeout_s: for the whole answer, its status line and headers included, however slowly it drips in.
        max_bytes: of its body, which is read no further than that; None is `MAX_BYTES`.
    """
    deadline = time.monotonic() + timeout_s
    try:
        connection, target, headers = _connection(urlsplit(url), headers, min(CONNECT_S, timeout_s))
    except (HTTPException, ValueError):
        return ConnectionFailed(kind="unreachable", why="the proxy that the environment names has no such address")
    with _shut_after(connection, timeout_s) as shut:
        try:
            connection.connect()
        except (HTTPException, OSError, ValueError) as error:
            cut_off = shut.is_set() and not isinstance(error, TimeoutError)
            return ConnectionFailed(kind="slow") if cut_off else _unreachable(error)
        shut.watched.append(connection.sock)
        # A timer that rang while the connection was being made found no socket yet.
        if time.monotonic() > deadline:
            return ConnectionFailed(kind="slow")
        try:
            connection.sock.settimeout(timeout_s)
            connection.request("GET" if data is None else "POST", target, body=data, headers=headers)
            answer = _read(connection, max_bytes or MAX_BYTES)
        # http.client reads numbers with int(), which has words of its own for what is none.
        except (HTTPException, OSError, ValueError) as error:
            return ConnectionFailed(kind="slow" if shut.is_set() or isinstance(error, TimeoutError) else "cut")
        # A socket that was shut looks like the end of an answer that says no length.
        return ConnectionFailed(kind="slow") if shut.is_set() else answer


def is_this_machine(host: str) -> bool:
    """Whether what is sent to a host stays on this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _read(connection: HTTPConnection, max_bytes: int) -> HttpReply | ConnectionFailed:
    with connection.getresponse() as reply:
        chunks, size = [], 0
        while chunk := reply.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                return ConnectionFailed(kind="long")
        # What is left of the length that the server had announced.
        if reply.length:
            return ConnectionFailed(kind="cut")
        return HttpReply(status=reply.status, headers=reply.headers, raw=b"".join(chunks))


class _Shut(threading.Event):
    """The event that is set when the time limit has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[socket.socket] = []


@contextmanager
def _shut_after(connection: HTTPConnection, seconds: float) -> Iterator[_Shut]:
    """Shut the connection's socket after some seconds, which ends whatever waits for it, and close it at the end."""
    shut = _Shut()

    def end() -> None:
        shut.set()
        # The connection forgets its socket once it has handed it to an answer; hence the list.
        for sock in {*shut.watched, connection.sock} - {None}:
            try:
                # Not SSLSocket's own, which closes its layer while another thread reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                continue

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield shut
    finally:
        timer.cancel()
        connection.close()


def _connection(
    url: SplitResult, headers: dict[str, str], connect_s: float
) -> tuple[HTTPConnection, str, dict[str, str]]:
    """The connection, not made yet, and the target and headers to send: straight, or by the environment's proxy."""
    host, path = url.hostname or "", url.path + (f"?{url.query}" if url.query else "")
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    said = None if is_this_machine(host) or proxy_bypass(url.netloc) else getproxies().get(url.scheme)
    if not said:
        return kind(host, url.port, timeout=connect_s), path, headers
    proxy = urlsplit(said if "//" in said else f"http://{said}")
    via = {}
    if proxy.username:
        user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        via["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    connection = kind(proxy.hostname or "", proxy.port or 80, timeout=connect_s)
    if url.scheme == "http":
        return connection, url.geturl(), headers | via
    connection.set_tunnel(host, url.port or 443, via)
    return connection, path, headers


def _unreachable(error: Exception) -> ConnectionFailed:
    if isinstance(error, SSLCertVerificationError):
        return ConnectionFailed(kind="untrusted", why=error.verify_message)
    if isinstance(error, TimeoutError):
        return ConnectionFailed(kind="unreachable", why="nothing answers")
    said = getattr(error, "strerror", None) or error
    return ConnectionFailed(kind="unreachable", why=" ".join(str(said).split()))
