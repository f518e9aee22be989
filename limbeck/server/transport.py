"""One request and its answer, or what became of it. Standard library alone: HTTP packages come and go with others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ssl import SSLCertVerificationError
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import HTTPErrorProcessor, HTTPHandler, HTTPSHandler, Request, build_opener

# To reach a server; how long it may take to answer is the caller's business.
CONNECT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said, whatever its status."""

    status: int
    headers: Message
    raw: bytes


@dataclass(frozen=True, kw_only=True)
class Broken:
    """No whole answer: out of reach, a certificate that cannot be verified, too slow, or cut off in the middle."""

    kind: Literal["unreachable", "untrusted", "slow", "cut"]
    why: str = ""


def exchange(url: str, data: bytes | None, headers: dict[str, str], timeout_s: float) -> Answer | Broken:
    """Send a request (POST where there is data) and read the whole answer.

    Args:
        timeout_s: for the whole answer, however slowly it drips in.
    """
    opener = build_opener(_AsIs, _Plain, _Secure)
    deadline = time.monotonic() + timeout_s
    try:
        with opener.open(Request(url, data=data, headers=headers), timeout=timeout_s) as reply:
            chunks = []
            while chunk := reply.read1(1 << 16):
                chunks.append(chunk)
                if time.monotonic() > deadline:
                    return Broken(kind="slow")
            raw, length = b"".join(chunks), reply.headers.get("Content-Length", "")
            if length.isdigit() and len(raw) < int(length):
                return Broken(kind="cut")
            return Answer(status=reply.status, headers=reply.headers, raw=raw)
    except TimeoutError:
        return Broken(kind="slow")
    except URLError as error:
        return _unreachable(error.reason)
    except (HTTPException, OSError):
        return Broken(kind="cut")


def _unreachable(reason: object) -> Broken:
    if isinstance(reason, SSLCertVerificationError):
        return Broken(kind="untrusted", why=reason.verify_message)
    if isinstance(reason, TimeoutError):
        return Broken(kind="unreachable", why="nothing answers")
    said = getattr(reason, "strerror", None) or reason
    return Broken(kind="unreachable", why=" ".join(str(said).split()))


class _AsIs(HTTPErrorProcessor):
    """Every status is an answer: errors are read, and no redirect carries a key to another host."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class _Patient(HTTPConnection):
    """Made within `CONNECT_S`, then given the time of the request."""

    def connect(self) -> None:
        answer_s = self.timeout
        self.timeout = CONNECT_S if answer_s is None else min(CONNECT_S, answer_s)
        super().connect()
        self.timeout = answer_s
        self.sock.settimeout(answer_s)


class _PatientSecure(_Patient, HTTPSConnection):
    pass


class _Plain(HTTPHandler):
    def http_open(self, req: Request) -> Any:
        return self.do_open(_Patient, req)


class _Secure(HTTPSHandler):
    def https_open(self, req: Request) -> Any:
        return self.do_open(_PatientSecure, req)
