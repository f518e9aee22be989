"""What a server's answer says: the ids that were drawn, their log-probabilities, and why it ended.

Ids are taken from where the server has them, in this order; only the last has to be believed:

    token_ids                     vLLM, SGLang (return_token_ids)
    logprobs.tokens               "token_id:123": vLLM before return_token_ids
    logprobs.content[].id         llama.cpp; the same as "token_id:123" in vLLM's chat
    the text, tokenised again     everybody else; what was drawn may have been other tokens of the same text
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from limbeck.flow import LimbeckError, Sampling, StopReason, TokenPrompt
from limbeck.responses.stops import StopStrings
from limbeck.server.client import short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]
IdSource = Literal["token_ids", "logprobs", "text"]

_FINISHED = {"stop": "stop", "eos": "stop", "eos_token": "stop", "stop_sequence": "stop", "tool_calls": "stop"}
_TOKEN_ID = re.compile(r"token_id:(\d+)")
# What stands for the bytes of a character that `max_new_tokens` cut through.
_HALF = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One answer, read.

    Attributes:
        logp: None where the server gave none for these ids.
        prompt_tokens: how many tokens the server read as prompt; None where it did not say.
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...] | None
    stop: StopReason
    source: IdSource
    prompt_ids: tuple[int, ...] | None
    prompt_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads answers of one model.

    Attributes:
        eos_token_ids: any of them ends a response and stays in it.
        end_id: the one that is put at the end where the server left it out.
        vocab_size: number of real token ids.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    end_id: int
    vocab_size: int

    def read(self, reply: Json, prompt: TokenPrompt, sampling: Sampling) -> Reading:
        """The first choice of an answer.

        Raises:
            LimbeckError: not the shape of an answer, ended for a reason that makes it no answer, ids outside the
                vocabulary, or a text that the tokenizer does not give back.
        """
        choice = _choice(reply, prompt)
        ids, logp, source = _drawn(choice)
        matched = choice.get("stop_reason", choice.get("matched_stop"))
        if ids is None:
            ids, ended = self._from_text(choice, matched, prompt, sampling)
        else:
            self._check_ids(ids, prompt)
            ended = self._why(choice["finish_reason"], ids, matched, prompt, sampling)
        reading = Reading(
            ids=ids,
            logp=logp if logp is not None and len(logp) == len(ids) else None,
            stop=ended,
            source=source,
            prompt_ids=_whole_numbers(choice.get("prompt_token_ids", reply.get("prompt_token_ids"))),
            prompt_tokens=_count(reply),
        )
        return self._ended(reading, matched, sampling)

    def _ended(self, reading: Reading, matched: object, sampling: Sampling) -> Reading:
        """Cut behind the first end token, closed by one where the server left it out, never longer than asked."""
        ids, limit = reading.ids, sampling.max_new_tokens
        first = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        if first is not None and first < limit:
            logp = None if reading.logp is None else reading.logp[: first + 1]
            return replace(reading, ids=ids[: first + 1], logp=logp, stop="eos")
        if len(ids) >= limit:
            logp = None if reading.logp is None else reading.logp[:limit]
            stop: StopReason = "stop" if len(ids) == limit and reading.stop == "stop" else "length"
            return replace(reading, ids=ids[:limit], logp=logp, stop=stop)
        if reading.stop != "eos":
            return reading
        end = matched if isinstance(matched, int) and matched in self.eos_token_ids else self.end_id
        # Nobody said how likely the end was.
        return replace(reading, ids=(*ids, end), logp=None)

    def _why(
        self, finish: str, ids: Sequence[int], matched: object, prompt: TokenPrompt, sampling: Sampling
    ) -> StopReason:
        if finish == "length":
            return "length"
        if not sampling.stop or any(token in self.eos_token_ids for token in ids):
            return "eos"
        if isinstance(matched, str) or StopStrings(self.tokenizer, sampling.stop).complete(ids):
            return "stop"
        return self._end_or_stop_string(matched, prompt, sampling)

    def _end_or_stop_string(self, matched: object, prompt: TokenPrompt, sampling: Sampling) -> StopReason:
        if isinstance(matched, int):
            return "eos"
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server stopped and does not say whether at the end or at a stop string of "
            f"{list(sampling.stop)}; leave responses.stop empty, or use a server that says so (vLLM, SGLang)"
        )

    def _from_text(
        self, choice: Json, matched: object, prompt: TokenPrompt, sampling: Sampling
    ) -> tuple[tuple[int, ...], StopReason]:
        text, finish = _text(choice, prompt), choice["finish_reason"]
        stop: StopReason = "length" if finish == "length" else "eos"
        if stop == "length":
            text = text.rstrip(_HALF)
        elif any(string in text for string in sampling.stop):
            stop = "stop"
        elif sampling.stop and isinstance(matched, str):
            text, stop = text + matched, "stop"
        elif sampling.stop:
            stop = self._end_or_stop_string(matched, prompt, sampling)
        return self._encode(text, prompt), stop

    def _encode(self, text: str, prompt: TokenPrompt) -> tuple[int, ...]:
        """The ids of a text in which the server spelled no control token, so that what looks like one is none."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[int] = encoded["input_ids"]  # type: ignore[assignment]
        back = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back != text:
            same = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            raise LimbeckError(
                f"{prompt_name(prompt)}: the server gives text alone, and the tokenizer does not give it back (from "
                f"character {same} on: {back[same : same + 20]!r} for {text[same : same + 20]!r}); use a server that "
                "returns token ids, such as vLLM"
            )
        return tuple(ids)

    def _check_ids(self, ids: Sequence[int], prompt: TokenPrompt) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise LimbeckError(
                f"{prompt_name(prompt)}: the server answers with ids from {min(ids)} to {max(ids)}, expected 0 to "
                f"{self.vocab_size - 1}: it serves a model with another tokenizer than the teacher's; serve the teacher"
            )


def _choice(reply: Json, prompt: TokenPrompt) -> Json:
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    finish = choice.get("finish_reason") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(finish, str):
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server answers {short(reply)}, expected choices with a finish_reason; "
            "check that it is an OpenAI-compatible one"
        )
    if finish != "length" and finish not in _FINISHED:
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server ended with finish_reason {finish!r}, expected stop or length; "
            "drop the prompt, or look at the server's log"
        )
    return choice


def _drawn(choice: Json) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None, IdSource]:
    """Ids with their log-probabilities, from wherever the server keeps ids."""
    logprobs = choice.get("logprobs")
    tokens, logp, entries = None, None, None
    if isinstance(logprobs, dict):
        entries = logprobs.get("content")
        if isinstance(entries, list):
            entries = [entry for entry in entries if isinstance(entry, dict)]
            tokens = [entry.get("token") for entry in entries]
            logp = _numbers([entry.get("logprob") for entry in entries])
        else:
            tokens, logp = logprobs.get("tokens"), _numbers(logprobs.get("token_logprobs"))
    if (ids := _whole_numbers(choice.get("token_ids"))) is not None:
        return ids, logp, "token_ids"
    if isinstance(tokens, list):
        matches = [_TOKEN_ID.fullmatch(str(token)) for token in tokens]
        spelled = tuple(int(match[1]) for match in matches if match)
        if matches and len(spelled) == len(matches):
            return spelled, logp, "logprobs"
    if isinstance(entries, list) and entries:
        ids = _whole_numbers([entry.get("id") for entry in entries])
        if ids is not None:
            return ids, logp, "logprobs"
    return None, None, "text"


def _text(choice: Json, prompt: TokenPrompt) -> str:
    message = choice.get("message")
    text = choice.get("text") if message is None else message.get("content") if isinstance(message, dict) else None
    if isinstance(message, dict) and (
        hidden := [n for n in ("reasoning_content", "reasoning", "tool_calls") if message.get(n)]
    ):
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server took {hidden[0]} out of the answer, so that its tokens are not known; "
            "start it without a parser for reasoning and tools, or use one that returns token ids, such as vLLM"
        )
    if not isinstance(text, str):
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server answers {short(choice)}, expected a text; "
            "check that it is an OpenAI-compatible one"
        )
    return text


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return None
    return tuple(value)


def _numbers(value: object) -> tuple[float, ...] | None:
    if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
        return None
    return tuple(float(item) for item in value)


def _count(reply: Json) -> int | None:
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def prompt_name(prompt: TokenPrompt) -> str:
    """How messages name a prompt."""
    return f"prompt {prompt.label or prompt.id}"
