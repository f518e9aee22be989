"""A judge to order: the fault-injecting server, whose replies are verdicts by a rule, or letters by another."""

from __future__ import annotations

import math
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


def lengths(a: str, b: str) -> dict[str, float]:
    """Probabilities of tokens, of which the longer answer's letter has most and the first one's a little more."""
    share_a = 0.5 if len(a) == len(b) else 0.75 if len(a) > len(b) else 0.15
    return {"A": 0.7 * share_a, " A": 0.2 * share_a, "B": 0.9 * (1 - share_a), "The": 0.05, " Answer": 0.05}


@dataclass
class JudgeState(State):
    """Of the judge.

    Attributes:
        letters: probabilities of tokens by the two answers, for who asks for them; None: it has none to give.
        most_top: how many of them it gives at most, where vLLM's --max-logprobs says so.
    """

    rule: Rule = longer
    letters: Callable[[str, str], dict[str, float]] | None = lengths
    most_top: int = 20
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
        if state.letters is not None and body.get("logprobs"):
            if (wanted := body["top_logprobs"]) > state.most_top:
                said = f"Requested sample logprobs of {wanted}, which is greater than max allowed: {state.most_top}"
                return 400, {"object": "error", "message": said}
            return 200, self.letter(body["top_logprobs"], text)
        with state.lock:
            state.judged.append(text)
        verdict = state.rule(*answers_in(text)) if ANSWERS.search(text) else "A"
        choice = {"index": 0, "finish_reason": state.finish, "message": {"role": "assistant", "content": verdict}}
        usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 10}} if state.counts else {}
        return 200, {"choices": [choice]} | usage

    def letter(self, top: int, text: str) -> dict[str, Any]:
        """One token with the likeliest others, as vLLM and llama.cpp give them."""
        state = self.state
        assert isinstance(state, JudgeState) and state.letters is not None
        if ANSWERS.search(text):
            with state.lock:
                state.judged.append(text)
            found = state.letters(*answers_in(text))
        else:
            found = {"A": 1.0}
        ranked = sorted(found.items(), key=lambda one: -one[1])
        shown = [{"token": token, "logprob": math.log(p) if p else -9999.0} for token, p in ranked[:top]]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": ranked[0][0]},
            "logprobs": {"content": [shown[0] | {"top_logprobs": shown}]},
        }
        usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 1}} if state.counts else {}
        return {"choices": [choice]} | usage


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
