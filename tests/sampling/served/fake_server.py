"""An OpenAI-compatible server with faults to order, as a process of its own.

It answers any prompt with tokens that depend on the prompt's ids and the seed alone, in the manner of one of the real
servers. What it was asked and what it did is in its record; both are reached over HTTP, as everything else.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

MODEL = "tiny-teacher"
END = 2
STRICT = {"model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"}


@dataclass
class State:
    """What can be set over /control, and the record."""

    tokenizer: Tokenizer
    manner: str = "vllm"
    models: list[str] = field(default_factory=lambda: [MODEL])
    faults: list[Any] = field(default_factory=list)
    delay_s: float = 0.0
    logprobs: bool = True
    key: str | None = None
    sends_end: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    answered: list[list[int]] = field(default_factory=list)
    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self) -> dict[str, Any]:
        return {"requests": self.requests, "answered": self.answered, "most": self.most}


def draw(prompt_ids: list[int], seed: int, max_tokens: int) -> list[int]:
    """Plain tokens, ended by `END` unless the limit comes first."""
    rng = random.Random(f"{prompt_ids}{seed}")
    ids = [rng.randrange(40, 90) for _ in range(rng.randrange(2, 2 * max_tokens))]
    return [*ids, END][:max_tokens]


def refusal(state: State, body: dict[str, Any], chat: bool) -> tuple[int, Any] | None:
    """What the real servers say to what they do not take."""
    if state.manner == "chat" and not chat:
        return 404, {"detail": "Not Found"}
    if state.manner == "openai" and (strange := sorted(body.keys() - STRICT)):
        return 400, {"error": {"message": f"Unrecognized request arguments supplied:\n {', '.join(strange)}"}}
    if state.manner == "transformers":
        if strange := sorted(body.keys() - STRICT - {"generation_config"}):
            return 422, {"detail": f"Unexpected fields in the request: {strange}"}
        if not chat and not isinstance(body["prompt"], str):
            return 400, {"detail": "prompt must be a string."}
    if body["model"] not in state.models:
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
    return None


def prompt_ids(state: State, body: dict[str, Any]) -> list[int]:
    if "messages" in body:
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in body["messages"])
        return state.tokenizer.encode(turns + "<|im_start|>assistant\n").ids
    prompt = body["prompt"]
    return state.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt


def answer(state: State, body: dict[str, Any], chat: bool) -> dict[str, Any]:
    asked = prompt_ids(state, body)
    ids = draw(asked, body.get("seed", 0), body["max_tokens"])
    ended = ids[-1] == END
    shown = ids if state.sends_end else [i for i in ids if i != END]
    text = state.tokenizer.decode(ids, skip_special_tokens=True)
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length"}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    logp = [-(i % 7) / 8 for i in shown]
    wanted = state.logprobs and body.get("logprobs")
    if state.manner == "vllm":
        if body.get("return_token_ids"):
            choice |= {"token_ids": shown, "prompt_token_ids": asked}
        if wanted:
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in shown], "token_logprobs": logp}
    if state.manner == "older vllm" and wanted:
        choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in shown], "token_logprobs": logp}
    reply = {"choices": [choice], "usage": {"prompt_tokens": len(asked), "completion_tokens": len(ids)}}
    if "llama.cpp" in state.manner and wanted:
        entries = [{"id": i, "token": "?", "logprob": p} for i, p in zip(shown, logp, strict=True)]
        # It makes one entry of tokens that are parts of one character.
        choice["logprobs"] = {"content": entries[1:] if state.manner == "merging llama.cpp" else entries}
    if state.manner == "llama.cpp" and body.get("verbose"):
        reply["__verbose"] = {"tokens": shown, "stop_type": "eos" if ended else "limit"}
    with state.lock:
        state.answered.append(asked)
    return reply


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/record":
            return self.reply(200, self.state.record())
        if not self.let_in():
            return None
        if self.path == "/v1/models":
            return self.reply(200, {"object": "list", "data": self.listed()})
        return self.reply(404, {"detail": "Not Found"})

    def listed(self) -> list[dict[str, Any]]:
        return [{"id": name} for name in self.state.models]

    def let_in(self) -> bool:
        key = self.state.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.reply(401, {"error": {"message": f"Incorrect API key: {self.headers.get('Authorization')}"}})
        return False

    def do_POST(self) -> None:
        state, body = self.state, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            for name, value in body.items():
                setattr(state, name, value)
            return self.reply(200, {})
        if not self.let_in():
            return None
        with state.lock:
            state.requests.append(body)
            state.now, state.most = state.now + 1, max(state.most, state.now + 1)
            fault = state.faults.pop(0) if state.faults else None
        try:
            time.sleep(state.delay_s)
            said = None if fault else self.said(body)
        finally:
            # Before the answer is out: whoever has it may ask again at once.
            with state.lock:
                state.now -= 1
        return self.misbehave(fault) if said is None else self.reply(*said)

    def said(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer to a request, when nothing is amiss."""
        chat = self.path == "/v1/chat/completions"
        return refusal(self.state, body, chat) or (200, answer(self.state, body, chat))

    def misbehave(self, fault: Any) -> None:
        if isinstance(fault, dict):
            return self.reply(fault["status"], fault.get("body", {"error": "as ordered"}), fault.get("headers"))
        if fault == "garbage":
            return self.reply(200, b"<html>It works!</html>")
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"te')
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(60):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        # "hang up": without a word.
        self.close_connection = True
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    Handler.state = State(Tokenizer.from_file(args.tokenizer))
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    # Ends with the tests: when they let go of its input.
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
    server.serve_forever()


@dataclass
class FakeServer:
    """The process, from the side of the tests."""

    process: subprocess.Popen[str]
    port: int

    @classmethod
    def start(cls, teacher: Path, port: int = 0) -> FakeServer:
        command = [sys.executable, "-m", "tests.sampling.served.fake_server", str(teacher / "tokenizer.json")]
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        return cls(process, int(process.stdout.readline()))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def order(self, **settings: Any) -> None:
        """Set fields of `State`."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/control", json.dumps(settings).encode())
        urllib.request.urlopen(request, timeout=10).read()

    def reset(self) -> None:
        """As it was at the start."""
        settings = {"manner": "vllm", "models": [MODEL], "faults": [], "delay_s": 0.0, "logprobs": True, "key": None}
        self.order(**settings, sends_end=True, requests=[], answered=[], most=0)

    def record(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/record", timeout=10) as reply:
            return json.loads(reply.read())

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


if __name__ == "__main__":
    main()
