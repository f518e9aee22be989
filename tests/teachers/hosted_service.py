"""A hosted service of the tests' own, which writes down what it charges before it answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "big-1"
PRICE = (1000.0, 5000.0)


@dataclass
class Bill:
    """What was asked and charged, and what can be ordered.

    Attributes:
        faults: of the next requests: a status, "hang up" (which is charged), or None for none.
        write: gives text, tokens of it and how it ended, from the last turn and the limit.
        unknown: settings that the service refuses.
    """

    requests: list[dict[str, Any]] = field(default_factory=list)
    charged: list[tuple[str, Decimal]] = field(default_factory=list)
    faults: list[Any] = field(default_factory=list)
    delay_s: float = 0.0
    added_tokens: int = 0
    unknown: tuple[str, ...] = ()
    counts: bool = True
    write: Callable[[str, int], tuple[str | None, int, str]] = lambda asked, limit: (f"It is {asked}", 3, "stop")
    choice: Callable[[dict[str, Any]], dict[str, Any]] = lambda choice: choice
    now: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total(self) -> Decimal:
        with self.lock:
            return sum((usd for _, usd in self.charged), Decimal(0))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bill: Bill

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": MODEL}]})

    def do_POST(self) -> None:
        bill, body = self.bill, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with bill.lock:
            bill.requests.append(body)
            bill.now += 1
            bill.most_at_once = max(bill.most_at_once, bill.now)
            fault = bill.faults.pop(0) if bill.faults else None
        try:
            self._answer(body, fault)
        finally:
            with bill.lock:
                bill.now -= 1

    def _answer(self, body: dict[str, Any], fault: Any) -> None:
        bill = self.bill
        strange = next((name for name in bill.unknown if name in body), None)
        if strange or isinstance(fault, int):
            message = f"Unsupported parameter: {strange}" if strange else "as ordered"
            return self.reply(400 if strange else fault, {"error": {"message": message}})
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        text, written, finish = bill.write(asked, body.get("max_tokens") or body["max_completion_tokens"])
        read = len(json.dumps(body.get("messages", asked))) // 4 + bill.added_tokens
        usd = (Decimal(read) * 1000 + Decimal(written) * 5000) / 1_000_000
        with bill.lock:
            bill.charged.append((asked, usd))
        time.sleep(bill.delay_s)
        if fault == "hang up":
            self.close_connection = True
            return None
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        usage = {"usage": {"prompt_tokens": read, "completion_tokens": written}} if bill.counts else {}
        choice = bill.choice({"index": 0, "finish_reason": finish, **said})
        return self.reply(200, {"choices": [choice]} | usage)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: a client that is killed hangs up."""


@contextmanager
def hosted_service() -> Iterator[tuple[str, Bill]]:
    """A running service: its address and its bill."""
    bill = Bill()
    server = _Server(("127.0.0.1", 0), type("_Ordered", (_Handler,), {"bill": bill}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", bill
    finally:
        server.shutdown()
        server.server_close()
