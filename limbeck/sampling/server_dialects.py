"""Request formats of OpenAI-compatible servers: the common fields, and those of each kind of server.

    engine        vLLM, SGLang, llama.cpp: ids in, ids out, every setting of the sampling said
    transformers  `transformers serve`: text in, text out, settings by a generation configuration
    openai        nothing but what OpenAI documents: no top_k, and whatever else the server does by itself

A server that knows more than one is asked in the first, whose requests leave least to its own defaults: those of
llama.cpp cut to 40 tokens, those of vLLM are the model's generation_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.types import Json, Sampling

Api = Literal["completions", "chat"]
Wire = Literal["ids", "text", "messages"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One request format.

    Attributes:
        wire: what stands for the prompt.
        logprobs: ask for log-probabilities; some servers give ids only with them.
    """

    api: Api
    name: Literal["engine", "transformers", "openai"]
    logprobs: bool = True

    @property
    def path(self) -> str:
        return "/completions" if self.api == "completions" else "/chat/completions"

    @property
    def wire(self) -> Wire:
        if self.api == "chat":
            return "messages"
        return "text" if self.name == "transformers" else "ids"

    def speaks(self, sampling: Sampling, chat_options: Mapping[str, Any]) -> bool:
        """Whether it can express a request."""
        return self.name != "openai" or (sampling.top_k == 0 and not (chat_options and self.api == "chat"))

    def request(self, question: CompletionRequest) -> Json:
        """The body of a request."""
        sampling = question.sampling
        body: Json = {
            "model": question.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": question.seed,
            "messages" if self.api == "chat" else "prompt": question.content,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self.name == "engine":
            body |= _engine(sampling, question.eos_token_ids)
        if self.name == "transformers":
            body["generation_config"] = json.dumps(_generation_config(sampling, question.eos_token_ids))
        elif self.logprobs:
            # Of the token that was drawn alone; the older API has no smaller number than one.
            body["logprobs"] = True if self.api == "chat" else 1
        if self.api == "chat" and question.chat_options:
            body["chat_template_kwargs"] = dict(question.chat_options)
        return body


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """One prompt with its sampling settings.

    Attributes:
        content: the prompt as the dialect sends it: ids, text, or messages.
        seed: of this row, below 2^31: what every server takes.
    """

    model: str
    content: Any
    sampling: Sampling
    seed: int
    eos_token_ids: Sequence[int]
    chat_options: Mapping[str, Any]


def dialects(api: Literal["auto", "completions", "chat"], *, chat: bool) -> tuple[Dialect, ...]:
    """The dialects to try, the most exact first.

    Args:
        chat: whether there are messages to send; without them only completions remain.
    """
    apis: list[Api] = []
    if api in ("auto", "completions"):
        apis.append("completions")
    if chat and api in ("auto", "chat"):
        apis.append("chat")
    return tuple(Dialect(api=kind, name=name) for kind in apis for name in ("engine", "transformers", "openai"))


def _engine(sampling: Sampling, eos_token_ids: Sequence[int]) -> Json:
    return {
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(eos_token_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # llama.cpp's words for the ids, which it keeps among what is for the curious.
        "return_tokens": True,
        "verbose": True,
        # Its own order has the temperature last, which is another distribution.
        "samplers": ["temperature", "top_k", "top_p"],
    }


def _generation_config(sampling: Sampling, eos_token_ids: Sequence[int]) -> Json:
    warm = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return {
        "do_sample": sampling.temperature > 0,
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": list(eos_token_ids),
        "pad_token_id": eos_token_ids[0],
    } | (warm if sampling.temperature > 0 else {})
