"""Questions to a hosted service, and what is kept of its replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from limbeck.client.openai import Refusal
from limbeck.client.replies import short_json, shortened
from limbeck.runtime.records import fingerprint
from limbeck.types import Json, LimbeckError, Sampling, is_unicode

Api = Literal["chat", "completions"]
# Tokens that a chat template writes around each turn, at most.
AROUND_A_TURN = 16
# Settings that may be left out where a service does not know them: at these values they say nothing.
_NEUTRAL_AT = {"temperature": 1.0, "top_p": 1.0}


@dataclass(frozen=True, kw_only=True)
class HostedQuestion:
    """One prompt with its sampling settings.

    Attributes:
        prompt_id: of the prompt that it asks.
        name: of the prompt, for messages.
        content: the turns of a conversation, or a text to continue.
        seed: of this prompt, below 2^31.
        top_logprobs: likeliest tokens wanted of each position of the answer.
    """

    prompt_id: str
    name: str
    model: str
    api: Api
    content: Sequence[Mapping[str, Any]] | str
    sampling: Sampling
    seed: int
    top_logprobs: int = 0

    @property
    def key(self) -> str:
        """A hash of everything that the answer depends on."""
        said = {"model": self.model, "api": self.api, "content": self.content, "seed": self.seed}
        sampling = self.sampling
        how = [sampling.max_new_tokens, sampling.temperature, sampling.top_p]
        return fingerprint(said | {"sampling": how, "top_logprobs": self.top_logprobs})

    @property
    def most_input_tokens(self) -> int:
        """No tokenizer makes more tokens of the prompt: one of each byte, and what stands around the turns."""
        if isinstance(self.content, str):
            return len(self.content.encode())
        return sum(len(str(turn["content"]).encode()) + AROUND_A_TURN for turn in self.content)


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Names of a request's settings, as one service takes them.

    Attributes:
        left_out: settings that it does not know.
    """

    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    left_out: frozenset[str] = frozenset()

    def request(self, question: HostedQuestion) -> Json:
        """The body of a request."""
        sampling = question.sampling
        chat = question.api == "chat"
        settings: Json = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": question.seed}
        body: Json = {"model": question.model, "messages" if chat else "prompt": question.content}
        body[self.limit] = sampling.max_new_tokens
        body |= {name: value for name, value in settings.items() if name not in self.left_out}
        return body | ({"logprobs": True, "top_logprobs": question.top_logprobs} if question.top_logprobs else {})

    def instead(self, refusal: Refusal, sampling: Sampling) -> Wording | None:
        """Names to try instead where the service refuses one; None where it refuses something else.

        Raises:
            LimbeckError: it refuses a setting that the recipe needs.
        """
        if self.limit == "max_tokens" and "max_tokens" in refusal.message:
            return replace(self, limit="max_completion_tokens")
        for name in ("temperature", "top_p", "seed"):
            if name in self.left_out or name not in refusal.message:
                continue
            # Answers are kept, so that the seed of a service that has none is not missed.
            if name in _NEUTRAL_AT and getattr(sampling, name) != _NEUTRAL_AT[name]:
                raise LimbeckError(
                    f"the service does not take responses.{name}={getattr(sampling, name):g} ({refusal}); set "
                    f"responses.{name}=1, its own"
                )
            return replace(self, left_out=self.left_out | {name})
        return None


def kept_of(reply: Json, question: HostedQuestion) -> Json:
    """What is kept of a reply: the answer's text and how it ended; or why it is none, in its place.

    `tokens` are those of the answer with their likeliest alternatives: bytes in hexadecimal, log-probability.
    """
    kept: Json = {"prompt": question.prompt_id}
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return kept | {"none": f"no choice: {short_json(reply)}"}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length", "eos"):
        return kept | {"none": f"ended with {short_json(finish)}"}
    if not isinstance(text, str):
        refused = message.get("refusal") if isinstance(message, dict) else None
        return kept | {"none": shortened(str(refused or "no text"), 120)}
    if not is_unicode(text):
        return kept | {"none": "half of a surrogate pair, which no tokenizer reads"}
    kept |= {"text": text, "finish": "length" if finish == "length" else "stop"}
    if question.top_logprobs:
        try:
            kept["tokens"] = _tokens_of(choice)
        except (KeyError, TypeError, ValueError) as error:
            raise LimbeckError(
                f"{question.name}: the service gives no log-probabilities of its answer ({error!r} in "
                f"{short_json(choice.get('logprobs'))}); set teacher.where.top_logprobs=0 for answers alone"
            ) from None
    return kept


def _tokens_of(choice: Json) -> list[Any]:
    return [
        [*_token(entry), [list(_token(other)) for other in entry["top_logprobs"]]]
        for entry in choice["logprobs"]["content"]
    ]


def _token(entry: Json) -> tuple[str, float]:
    raw = entry.get("bytes")
    # A control token has a name and no bytes.
    name = entry["token"].encode() if raw is None else bytes(raw)
    return name.hex(), float(entry["logprob"])
