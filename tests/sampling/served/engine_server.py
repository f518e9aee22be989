"""A vLLM in small: a real model that is loaded anew from a folder on request, in the shapes recorded from vLLM 0.32.0.

It is a thread of the tests. Faults to order and the record are those of the fake server that samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.sampling.served.fake_server import Handler, State

DEFAULT = "default"


class EngineHandler(Handler):
    """Writes with the weights that it was given last.

    Attributes:
        first: the folder whose weights it has after a start.
        empty: a module of that model, to load weights into.
        model: the same with weights; None once it has lost them.
        developer: whether the doors of developer mode are open.
        versions: whether it knows versions of weights.
        deaf: it says that it has loaded weights, and has not.
        lie: added to the log-probabilities of its own tokens.
        before: called with each request's path and body; raises ConnectionError to hang up.
        calls: paths and bodies, in order.
    """

    first: Path
    empty: Any
    model: Any
    version: str
    developer: bool
    versions: bool
    deaf: bool
    lie: float
    before: Callable[[str, dict[str, Any]], None]
    calls: list[tuple[str, dict[str, Any]]]
    one_at_a_time: threading.Lock

    @classmethod
    def restart(cls) -> None:
        """As it is after a start: its first weights, and no version of anybody's."""
        with cls.one_at_a_time:
            cls.load(cls.first)
            cls.version = DEFAULT

    @classmethod
    def load(cls, folder: Path) -> None:
        # Not by transformers, whose loading changes what all threads share.
        tensors = load_file(folder / "model.safetensors")
        lacking = cls.empty.load_state_dict(tensors, strict=False)
        assert not lacking.unexpected_keys, lacking
        cls.model = cls.empty

    @classmethod
    def asked(cls) -> list[tuple[int, ...]]:
        """The prompts that were answered, in order."""
        return [tuple(b["prompt"]) for p, b in cls.calls if p == "/v1/completions" and "prompt_logprobs" not in b]

    def do_GET(self) -> None:
        try:
            self.before(self.path, {})
        except ConnectionError:
            self.close_connection = True
            return None
        if self.path == "/weight_info" and self.developer and self.versions:
            return self.reply(200, {"weight_version": type(self).version})
        if self.path.startswith("/server_info") and self.developer:
            return self.reply(200, {"vllm_config": {"model_config": {"dtype": "torch.float32"}}})
        return super().do_GET()

    def said(self, body: dict[str, Any]) -> tuple[int, Any]:
        cls = type(self)
        self.before(self.path, body)
        with self.one_at_a_time:
            cls.calls.append((self.path, body))
            if cls.model is None:
                raise ConnectionError
            if self.path == "/tokenize":
                ids = self.state.tokenizer.encode(body["prompt"], add_special_tokens=False).ids
                return 200, {"tokens": ids, "count": len(ids), "max_model_len": 128}
            if self.path == "/v1/completions":
                return self.scored(body) if "prompt_logprobs" in body else self.answered(body)
            if not self.developer:
                return 404, {"detail": "Not Found"}
            if self.path == "/collective_rpc":
                return self.loaded(body)
            if self.path == "/reset_prefix_cache":
                return 200, {"success": True}
            if self.path == "/update_weight_version" and self.versions:
                cls.version = body["new_version"]
                return 200, {"success": True, "new_version": cls.version}
            return 404, {"detail": "Not Found"}

    def loaded(self, body: dict[str, Any]) -> tuple[int, Any]:
        if "method" not in body:
            message = "Missing 'method' in request body"
            return 400, {"error": {"message": message, "type": "Bad Request", "param": None, "code": 400}}
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        if not folder.is_dir():
            # It has let go of the weights that it had, and ends at the next request.
            type(self).model = None
            why = "Repo id must be in the form 'repo_name' or 'namespace/repo_name': '<path>'. Use `repo_type` ..."
            message = f"Call to collective_rpc method failed: Worker failed with error '{why}', please check the stack"
            return 500, {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}
        if not self.deaf:
            type(self).load(folder)
        return 200, {"results": [None]}

    def scored(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids = body["prompt"]
        rows: list[Any] = [None]
        for row_V, token in zip(self.logp(ids)[:-1], ids[1:], strict=True):
            best = row_V.topk(body["prompt_logprobs"]).indices.tolist()
            rows.append({str(i): {"logprob": row_V[i].item()} for i in dict.fromkeys([token, *best])})
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": rows}
        return 200, {"object": "text_completion", "choices": [choice]}

    def answered(self, body: dict[str, Any]) -> tuple[int, Any]:
        asked, ids, logp = body["prompt"], [], []
        draw = torch.Generator().manual_seed(body["seed"])
        while len(ids) < body["max_tokens"] and not set(ids[-1:]) & set(body["stop_token_ids"]):
            row_V = self.logp([*asked, *ids])[-1]
            hot = body["temperature"] > 0
            token = int(torch.multinomial((row_V / body["temperature"]).softmax(-1), 1, generator=draw)) if hot else -1
            ids.append(token if hot else int(row_V.argmax()))
            logp.append(row_V[ids[-1]].item() + self.lie)
        ended = ids[-1] in body["stop_token_ids"]
        choice = {
            "index": 0,
            "text": self.state.tokenizer.decode(ids),
            "finish_reason": "stop" if ended else "length",
            "stop_reason": ids[-1] if ended else None,
            "token_ids": ids,
            "prompt_token_ids": asked,
            "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": logp},
        }
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(asked), "completion_tokens": len(ids)}}

    def logp(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def do_POST(self) -> None:
        try:
            super().do_POST()
        except ConnectionError:
            self.close_connection = True


@contextmanager
def engine_server(first: Path, **settings: Any) -> Iterator[tuple[type[EngineHandler], str]]:
    """A running server with the weights in a folder: its handler, whose attributes may be changed, and its address."""
    from tokenizers import Tokenizer

    handler: type[EngineHandler] = type("_Engine", (EngineHandler,), {"one_at_a_time": threading.Lock()})
    handler.state = State(Tokenizer.from_file(str(first / "tokenizer.json")), models=["student"])
    handler.first, handler.calls, handler.lie = first, [], 0.0
    handler.empty = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32).eval()
    handler.developer, handler.versions, handler.deaf = True, True, False
    handler.before = staticmethod(lambda path, body: None)
    for name, value in settings.items():
        setattr(handler, name, value)
    handler.restart()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
