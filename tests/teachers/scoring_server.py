"""A server that scores given tokens with a real model, in the shapes recorded from vLLM, SGLang and llama.cpp.

It is a thread of the tests, since it needs their model; faults to order, delays and the record are those of the fake
server that samples.
"""

from __future__ import annotations

import base64
import fcntl
import io
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.sampling.served.fake_server import Handler, State

Scores = Callable[[list[int]], Tensor]


class ScoringHandler(Handler):
    """Answers with log-probabilities.

    Attributes:
        scores: log-probabilities (T, V) of what follows each of the given tokens.
        cap: the most log-probabilities of a position.
        lie: changes an answer's rows before they are sent.
        scale_out: whether vLLM was started with --enable-scale-out.
        states: states (T, D) behind the last block, for a server that writes them into `folder`; None for others.
        forge: changes the tensors of a file before it is written; None writes none.
        pooled: states (T, D) behind the final norm, for a pooling server, which has no other way; None for others.
        task: what the pooling server was started for.
        send: changes what it answers with, a list of texts' states in base64.
        window: the most tokens of a text.
        late_s: how long a file takes after the answer.
    """

    scale_out: bool = True
    states: Scores | None = None
    pooled: Scores | None = None
    task: str = "token_embed"
    send: Callable[[list[Any]], list[Any]]
    window: int | None = None
    folder: Path
    forge: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]
    late_s: float = 0.02
    scores: Scores
    cap: int
    lie: Callable[[list[Any]], list[Any]]

    def said(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.path == "/tokenize":
            text = body["content"] if self.state.manner == "llama.cpp" else body["prompt"]
            ids = self.state.tokenizer.encode(text, add_special_tokens=False).ids
            return 200, {"tokens": ids, "count": len(ids)}
        if body.get("model", self.state.models[0]) not in self.state.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if self.pooled is not None:
            return self.vllm_pooling(body) if self.path == "/pooling" else (404, {"detail": "Not Found"})
        if self.state.manner == "vllm" and self.path == "/inference/v1/generate":
            return self.vllm_choice(body)
        route = {"vllm": "/v1/completions", "sglang": "/generate", "llama.cpp": "/completion"}[self.state.manner]
        if self.path != route:
            return 404, {"detail": "Not Found"}
        return {"vllm": self.vllm, "sglang": self.sglang, "llama.cpp": self.llama_cpp}[self.state.manner](body)

    def vllm(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, count = body["prompt"], body.get("prompt_logprobs")
        transfer = None if self.states is None else {"hidden_states_path": str(self.write_states(ids))}
        if count is None:
            choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": None}
            return 200, {"object": "text_completion", "choices": [choice], "kv_transfer_params": transfer}
        if count > self.cap:
            message = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.cap}"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        rows: list[Any] = [None]
        for row_V, token in zip(self.scores(ids)[:-1], ids[1:], strict=True):
            best = row_V.topk(count).indices.tolist()
            rows.append(
                {
                    str(i): {"logprob": row_V[i].item(), "rank": rank, "decoded_token": "?"}
                    for rank, i in enumerate(dict.fromkeys([token, *best]), start=1)
                }
            )
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": self.lie(rows)}
        return 200, {"object": "text_completion", "choices": [choice], "kv_transfer_params": transfer}

    def vllm_choice(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.scale_out:
            message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
            return 403, {"error": {"message": message, "type": "PermissionDeniedError", "code": 403}}
        ids, sampling = body["token_ids"], body["sampling_params"]
        count, start, chosen = (
            sampling[name] for name in ("prompt_logprobs", "prompt_logprob_start", "prompt_logprob_token_ids")
        )
        wide = max(map(len, chosen))
        if count > self.cap or wide > self.cap:
            message = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.cap}"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        assert len(chosen) == len(ids) - 1 - start, "vLLM refuses any other number of rows"
        scores_TV = self.scores(ids)[:-1]
        table = np.full((len(chosen), wide), -np.inf, dtype=np.float32)
        for row, own in enumerate(chosen):
            table[row, : len(own)] = scores_TV[start + row][own].numpy()
        file = io.BytesIO()
        np.save(file, table)
        rows = self.vllm({"prompt": ids, "prompt_logprobs": count})[1]["choices"][0]["prompt_logprobs"]
        said = base64.b64encode(file.getvalue()).decode()
        return 200, {"choices": [{"index": 0, "token_ids": [1]}], "prompt_logprobs": rows} | {
            "prompt_token_id_logprobs": said
        }

    def vllm_pooling(self, body: dict[str, Any]) -> tuple[int, Any]:
        """As recorded from vLLM 0.32.0 with --runner pooling."""
        ids = body["input"]
        if body.get("task") != self.task:
            said = f"Try switching the model's pooling_task via --pooler-config.task {body['task']}. (parameter=task)"
            return 400, {"error": {"message": said, "type": "BadRequestError", "param": "task", "code": 400}}
        if self.window is not None and len(ids) > self.window:
            said = f"This model's maximum context length is {self.window} tokens. However, your prompt contains "
            said += f"{len(ids)} input tokens, which exceeds this limit even without any output tokens."
            return 400, {"error": {"message": said, "type": "BadRequestError", "param": "input_tokens", "code": 400}}
        assert self.pooled is not None and body["encoding_format"] == "base64" and body["endianness"] == sys.byteorder
        states_TD = self.pooled(ids)
        if body["use_activation"]:
            states_TD = torch.nn.functional.normalize(states_TD, dim=-1)
        raw = states_TD.to(getattr(torch, body["embed_dtype"])).contiguous().view(torch.uint8).numpy().tobytes()
        said = self.send([{"index": 0, "object": "pooling", "data": base64.b64encode(raw).decode()}])
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids), "completion_tokens": 0}
        return 200, {"id": "pooling-a045ff28", "object": "list", "model": body["model"], "data": said, "usage": usage}

    def listed(self) -> list[dict[str, Any]]:
        return [one | {"max_model_len": self.window} for one in super().listed()]

    def write_states(self, ids: list[int]) -> Path:
        """The file of a text's states, which is written after the answer, behind a lock that is there before it."""
        assert self.states is not None
        path = self.folder / f"cmpl-{uuid.uuid4().hex[:16]}-0-{uuid.uuid4().hex[:8]}.safetensors"
        lock = path.with_name(f"{path.name}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        tensors = self.forge({"hidden_states": self.states(ids)[:, None].clone(), "token_ids": torch.tensor(ids)})

        def write() -> None:
            time.sleep(self.late_s)
            if tensors is not None:
                save_file(tensors, path)
            lock.close()

        threading.Thread(target=write, daemon=True).start()
        return path

    def sglang(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, count, start = body["input_ids"], body["top_logprobs_num"], body["logprob_start_len"]
        own: list[Any] = [[None, ids[start], None]]
        top: list[Any] = [None]
        for row_V, token in list(zip(self.scores(ids)[:-1], ids[1:], strict=True))[start:]:
            own.append([row_V[token].item(), token, None])
            top.append([[row_V[i].item(), i, None] for i in row_V.topk(count).indices.tolist()])
        meta = {"input_token_logprobs": own, "input_top_logprobs": self.lie(top)}
        if chosen := body.get("token_ids_logprob"):
            scores_TV = self.scores(ids)[start:-1]
            said = ([[row_V[i].item(), i, None] for i in chosen] for row_V in scores_TV)
            meta["input_token_ids_logprobs"] = [None, *said]
        return 200, {"text": "x", "meta_info": meta}

    def llama_cpp(self, body: dict[str, Any]) -> tuple[int, Any]:
        row_V = self.scores(body["prompt"])[-1]
        best = row_V.topk(min(body["n_probs"], len(row_V))).indices.tolist()
        entries = [{"id": i, "token": "?", "bytes": [63], "logprob": row_V[i].item()} for i in best]
        drawn = {"id": best[0], "token": "?", "logprob": row_V[best[0]].item(), "top_logprobs": self.lie(entries)}
        return 200, {"tokens": [best[0]], "completion_probabilities": [drawn]}


@contextmanager
def scoring_server(
    tokenizer: Any, scores: Scores, *, manner: str = "vllm", cap: int = 1000
) -> Iterator[tuple[type[ScoringHandler], str, Callable[[], None]]]:
    """A running server: its handler, whose attributes may be changed, its address, and what stops it."""
    handler = type("_Handler", (ScoringHandler,), {})
    handler.state = State(tokenizer, manner=manner)
    handler.scores, handler.cap, handler.lie = staticmethod(scores), cap, staticmethod(lambda rows: rows)
    handler.forge = staticmethod(lambda tensors: tensors)
    handler.send = staticmethod(lambda rows: rows)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    stopped = threading.Event()

    def stop() -> None:
        if not stopped.is_set():
            stopped.set()
            server.shutdown()
            server.server_close()

    yield handler, f"http://127.0.0.1:{server.server_address[1]}", stop
    stop()
