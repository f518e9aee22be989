"""Servers that are slow, endless, huge, cut off or no servers at all: each ends in time and in one line."""

from __future__ import annotations

import json
import re
import resource
import socket
import time

import pytest

from limbeck.client import http as transport
from limbeck.client.openai import Refusal, Server
from limbeck.runtime.console import printable
from limbeck.types import LimbeckError
from tests.client.evil import HEAD, Plot, dripped, hung, once, playing, poured, reset, whole

TIMEOUT_S = 2.0
SLOW = r"did not answer within 2 s"
CUT = "cut the connection off"
LONG = r"answers with more than \d+ MiB"
NO_JSON = "expected a JSON object"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

ENDLESS: dict[str, tuple[Plot, str]] = {
    "nothing is ever said": (hung(), SLOW),
    "the status line drips": (dripped(b"H"), f"{SLOW}|{CUT}"),
    "a status line and no more": (hung(HEAD), SLOW),
    "the name of a header drips": (dripped(b"x", HEAD + b"X-"), SLOW),
    "headers drip": (dripped(b"X-A: b\r\n", HEAD), f"{SLOW}|{CUT}"),
    "100 Continue drips": (dripped(b"HTTP/1.1 100 Continue\r\n\r\n"), SLOW),
    "100 Continue pours": (poured(b"HTTP/1.1 100 Continue\r\n\r\n" * 100), SLOW),
    "headers of a 100 Continue drip": (dripped(b"X-A: b\r\n", b"HTTP/1.1 100 Continue\r\n"), f"{SLOW}|{CUT}"),
    "the size of a chunk drips": (dripped(b"0", CHUNKED), SLOW),
    "a chunk's extension drips": (dripped(b"x", CHUNKED + b"5;"), SLOW),
    "a chunk drips": (dripped(b" ", CHUNKED + b"FFFFFF\r\n"), SLOW),
    "chunks of one byte drip": (dripped(b"1\r\n \r\n", CHUNKED), SLOW),
    "trailers drip": (dripped(b"X-A: b\r\n", CHUNKED + b"0\r\n"), SLOW),
    "trailers pour": (poured(b"X-A: b\r\n" * 1000, CHUNKED + b"0\r\n"), SLOW),
    "a body drips": (dripped(b" ", HEAD + b"Content-Length: 100000\r\n\r\n"), SLOW),
    "a body without a length drips": (dripped(b" ", HEAD + b"\r\n"), SLOW),
    "a body stops half-way": (hung(HEAD + b'Content-Length: 9\r\n\r\n{"a'), SLOW),
    "a body pours": (poured(b" " * 65536, HEAD + b"\r\n"), f"{LONG}|{SLOW}"),
    "chunks pour": (poured(b"10000\r\n" + b" " * 65536 + b"\r\n", CHUNKED), f"{LONG}|{SLOW}"),
    "a chunk of negative size pours": (poured(b" " * 65536, CHUNKED + b"-5\r\n"), f"{LONG}|{SLOW}"),
    "an endless line pours": (poured(b"x" * 65536, HEAD), f"{SLOW}|{CUT}"),
}
BROKEN: dict[str, tuple[Plot, str]] = {
    "hangs up at once": (once(), CUT),
    "is torn down": (reset, CUT),
    "Content-Length is a superscript": (once(HEAD + "Content-Length: ²\r\n\r\n{".encode("latin-1")), NO_JSON),
    "Content-Length has 5,000 digits": (
        once(HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{"),
        f"{CUT}|{NO_JSON}",
    ),
    "Content-Length is negative": (once(HEAD + b"Content-Length: -1\r\n\r\n{"), NO_JSON),
    "Content-Length is too long": (once(HEAD + b"Content-Length: 50\r\n\r\n{}"), CUT),
    "a chunk's size is no number": (once(CHUNKED + b"zz\r\n{}"), CUT),
    "a chunk's size has 5,000 digits": (once(CHUNKED + b"F" * 5000 + b"\r\n{}"), CUT),
    "a status of superscripts": (once("HTTP/1.1 ²00 OK\r\n\r\n{}".encode()), CUT),
    "a status that is none": (once(b"HTTP/1.1 000 OK\r\n\r\n{}"), CUT),
    "no HTTP": (once(bytes(range(256)) * 20), CUT),
    "an old HTTP": (once(b"<html>It works!</html>"), CUT),
    "200 headers": (once(HEAD + b"X-A: b\r\n" * 200 + b"\r\n{}"), CUT),
    "a header of 100 kB": (once(HEAD + b"X-A: " + b"b" * 100_000 + b"\r\n\r\n{}"), CUT),
    "compressed though not asked for": (
        once(whole(b"\x1f\x8b\x08\x00{}", headers="Content-Encoding: gzip\r\n")),
        NO_JSON,
    ),
    "no Unicode": (once(whole(b'{"a": "\xff"}')), NO_JSON),
    "JSON 100,000 deep": (once(whole(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)), NO_JSON),
    "JSON 600 deep": (once(whole(b'{"a":[' * 600 + b"1" + b"]}" * 600)), f"{NO_JSON}|nothing"),
    "a number of 5,000 digits": (once(whole(b'{"a": ' + b"9" * 5000 + b"}")), NO_JSON),
    "a list": (once(whole(b"[1, 2]")), NO_JSON),
    "a string": (once(whole(b'"yes"')), NO_JSON),
    "null": (once(whole(b"null")), NO_JSON),
    "nothing": (once(whole(b"", status="204 No Content")), NO_JSON),
    "a redirect to nowhere": (once(whole(b"", status="302 Found")), "redirects to nowhere"),
    "a redirect to a file": (
        once(whole(b"", "302 Found", "Location: file:///etc/passwd\r\n")),
        "redirects to file:///etc",
    ),
    "Retry-After is a superscript": (
        once("HTTP/1.1 503 No\r\nRetry-After: ²\r\nContent-Length: 0\r\n\r\n".encode("latin-1")),
        r"cannot answer \(HTTP 503: no reason given\);",
    ),
    "Retry-After in the year 99999": (
        once(whole(b"", "503 No", "Retry-After: Fri, 31 Dec 99999 23:59:59 GMT\r\n")),
        r"cannot answer \(HTTP 503: no reason given\)( and asks to wait for years)?;",
    ),
    "Retry-After is too long for a number": (
        once(whole(b"", "503 No", f"Retry-After: {'9' * 5000}\r\n")),
        r"cannot answer \(HTTP 503: no reason given\);",
    ),
    "Retry-After is longer than a life": (
        once(whole(b"", "503 No", f"Retry-After: {'9' * 100}\r\n")),
        "asks to wait for years",
    ),
    "an error of 100 kB": (once(whole(b'{"error": "' + b"x" * 100_000 + b'"}', "401 No")), r"x{240} \.\.\."),
    "TLS": (once(b"\x15\x03\x01\x00\x02\x02\x28"), CUT),
}


def said_by(plot: Plot, timeout_s: float = TIMEOUT_S) -> str:
    """The one line in which a request to such a server ends."""
    with playing(plot) as (url, _):
        server = Server(base_url=url, timeout_s=timeout_s, retries=0)
        try:
            reply = server.post("/completions", {"prompt": "x"})
        except LimbeckError as error:
            return str(error)
    return f"Refusal {reply}" if isinstance(reply, Refusal) else "nothing wrong"


@pytest.mark.parametrize("name", ENDLESS)
def test_the_time_for_an_answer_holds_from_its_first_byte_to_its_last(name: str) -> None:
    plot, expected = ENDLESS[name]
    started = time.monotonic()
    line = said_by(plot)
    assert time.monotonic() - started < TIMEOUT_S + 1
    assert "\n" not in line and re.search(expected, line), line


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_is_said_in_one_line(name: str) -> None:
    plot, expected = BROKEN[name]
    line = said_by(plot)
    assert "\n" not in line and len(line) < 1000
    assert re.search(expected, line), line


def test_a_body_has_a_greatest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the server is, and however long it is given."""
    monkeypatch.setattr(transport, "MAX_BYTES", 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = said_by(poured(b" " * 65536, HEAD + b"\r\n"), timeout_s=60)
    assert re.search(LONG, line), line
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_server_that_reads_nothing_is_slow() -> None:
    """A large request fills the buffers on the way, and nobody takes it out of them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout_s=1, retries=0)
        started = time.monotonic()
        with pytest.raises(LimbeckError, match="did not answer within 1 s"):
            server.post("/completions", {"prompt": "x" * (64 << 20)})
        assert time.monotonic() - started < 4


def test_tls_that_never_shakes_hands_ends_in_time() -> None:
    with playing(hung()) as (url, _):
        server = Server(base_url=url.replace("http", "https"), timeout_s=1, retries=0)
        started = time.monotonic()
        with pytest.raises(LimbeckError, match=r"cannot be reached|did not answer"):
            server.models()
        assert time.monotonic() - started < 3


def test_a_whole_answer_is_taken_as_it_is() -> None:
    body = json.dumps({"data": [{"id": "m"}], "x": "ä\u2028"}).encode()
    for plot in (
        once(whole(body)),
        once(HEAD + b"\r\n" + body),
        once(b"HTTP/1.0 200 OK\r\n\r\n" + body),
        once(HEAD + b"Connection: close\r\n\r\n", body[:9], body[9:]),
        once(CHUNKED + b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in body) + b"0\r\n\r\n"),
        once(b"HTTP/1.1 100 Continue\r\n\r\n", whole(body)),
    ):
        with playing(plot) as (url, _):
            assert Server(base_url=url, retries=0).get("/models") == json.loads(body)


def test_requests_go_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """For other machines: what is on this one is asked without."""
    with playing(once(whole(b'{"data": []}'))) as (url, asked):
        proxy = url.removesuffix("/v1").replace("http://", "http://me:pass%21word@")
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy)
        assert Server(base_url="http://teacher.example:8000/v1", retries=0).models() == ()
        assert asked[0].startswith(
            "GET http://teacher.example:8000/v1/models HTTP/1.1\r\nHost: teacher.example:8000\r\n"
        )
        assert "Proxy-Authorization: Basic bWU6cGFzcyF3b3Jk\r\n" in asked[0]
        # The proxy answers with JSON where the tunnel's TLS should begin.
        with pytest.raises(LimbeckError, match=r"https://teacher\.example/v1 cannot be reached"):
            Server(base_url="https://teacher.example/v1", retries=0).models()
        assert asked[1].startswith("CONNECT teacher.example:443 HTTP/1.") and "Proxy-Authorization" in asked[1]
        monkeypatch.setenv("no_proxy", "teacher.example")
        with pytest.raises(LimbeckError, match="cannot be reached"):
            Server(base_url="http://teacher.example:8000/v1", retries=0, timeout_s=5).models()
        assert len(asked) == 2
    with playing(once(whole(b'{"data": []}'))) as (url, asked):
        assert Server(base_url=url, retries=0).models() == () and len(asked) == 1
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://proxy:99999")
    with pytest.raises(LimbeckError, match="proxy that the environment names"):
        Server(base_url="http://teacher.example/v1", retries=0).models()


@pytest.mark.parametrize("url", ["http://host:99999/v1", "http://host/v1/ä", "http://host/\x01"])
def test_addresses_that_no_request_can_be_sent_to(url: str) -> None:
    with pytest.raises(LimbeckError, match="expected something like"):
        Server(base_url=url)


def test_what_a_server_says_moves_no_cursor() -> None:
    body = json.dumps({"error": "\x1b]0;owned\x07\x1b[2J\u202egnp"}).encode()
    line = printable(said_by(once(whole(body, "401 No"))))
    assert line.isprintable() and r"\x1b]0;owned\x07\x1b[2J\u202egnp" in line
