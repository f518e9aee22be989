"""A judge to order: the fault-injecting server, whose chat completions are verdicts by a rule."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from tokenizers import Tokenizer, models

from tests.sampling.served.fake_server import Handler, State

JUDGE = "tiny-judge"
ANSWERS = re.compile(r"=== Answer A ===\n(.*)\n=== Answer B ===\n(.*)\n=== End of the answers ===", re.DOTALL)
Rule = Callable[[str, str], str]


def answers_in(text: str) -> tuple[str, str]:
    """The answers A and B as the judge reads them."""
    found = ANSWERS.search(text)
    assert found is not None
    return found[1], found[2]


def longer(a: str, b: str) -> str:
    verdict = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return f"One says more than the other.\n\n[[{verdict}]]"


def always_a(a: str, b: str) -> str:
    del a, b
    return "**Verdict:** [[A]]"


@dataclass
class JudgeState(State):
    rule: Rule = longer
    finish: str = "stop"
    counts: bool = True
    judged: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Wait for what is under way, whether or not anybody still waits for the reply."""
        while self.now:
            time.sleep(0.005)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: a client that is killed hangs up."""


class JudgeHandler(Handler):
    def said(self, body: dict[str, Any]) -> tuple[int, Any]:
        state, text = self.state, body["messages"][-1]["content"]
        assert isinstance(state, JudgeState)
        with state.lock:
            state.judged.append(text)
        verdict = state.rule(*answers_in(text))
        choice = {"index": 0, "finish_reason": state.finish, "message": {"role": "assistant", "content": verdict}}
        usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 10}} if state.counts else {}
        return 200, {"choices": [choice]} | usage


@contextmanager
def judging() -> Iterator[tuple[str, JudgeState]]:
    """A running judge: its address and what can be set."""
    state = JudgeState(tokenizer=Tokenizer(models.BPE()), models=[JUDGE])
    server = _Server(("127.0.0.1", 0), type("Ordered", (JudgeHandler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
