"""Reading a server's answer: the sampled ids, their log-probabilities, and the reason it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from limbeck.models.vocabulary import control_ids
from limbeck.sampling.server_choices import (
    IdSource,
    choice_of,
    choice_text,
    count_of,
    drawn,
    matched_by,
    prompt_name,
    whole_numbers,
)
from limbeck.sampling.stop_strings import StopStrings
from limbeck.types import Author, Json, LimbeckError, Sampling, StopReason, TokenPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What stands for the bytes of a character that `max_new_tokens` cut through.
_HALF = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One parsed answer.

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
class ReplyReader:
    """Reads answers of one model.

    Attributes:
        eos_token_ids: any of them ends a response and stays in it.
        end_id: the one that is put at the end where the server left it out.
        vocab_size: number of real token ids.
        author: whose tokenizer it is, for messages.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    end_id: int
    vocab_size: int
    author: Author = "teacher"

    def read(self, reply: Json, prompt: TokenPrompt, sampling: Sampling) -> Reading:
        """The first choice of an answer.

        Raises:
            LimbeckError: not the shape of an answer, ended for a reason that makes it no answer, ids outside the
                vocabulary, or a text that the tokenizer does not give back.
        """
        choice = choice_of(reply, prompt)
        ids, logp, source = drawn(choice, reply)
        if source == "logprobs" and ids is not None and not self._all_there(ids, choice, reply):
            ids, logp, source = None, None, "text"
        matched = matched_by(choice, reply)
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
            prompt_ids=whole_numbers(choice.get("prompt_token_ids", reply.get("prompt_token_ids"))),
            prompt_tokens=count_of(reply, "prompt_tokens"),
        )
        no_end = count_of(reply, "completion_tokens") == len(ids) + 1
        return self._ended(reading, matched, sampling, no_end=no_end)

    def _all_there(self, ids: Sequence[int], choice: Json, reply: Json) -> bool:
        """Whether as many ids are there as were drawn, the end perhaps left out; merged entries hide some."""
        count = count_of(reply, "completion_tokens")
        no_end = choice["finish_reason"] != "length" and not (ids and ids[-1] in self.eos_token_ids)
        return count is None or len(ids) == count or (no_end and len(ids) == count - 1)

    def _ended(self, reading: Reading, matched: object, sampling: Sampling, *, no_end: bool) -> Reading:
        """Cut behind the first end token, closed by one where the server left it out, never longer than asked.

        Args:
            no_end: the server counts one token more than it gives.
        """
        ids, limit = reading.ids, sampling.max_new_tokens
        first = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        if first is not None and first < limit:
            logp = None if reading.logp is None else reading.logp[: first + 1]
            return replace(reading, ids=ids[: first + 1], logp=logp, stop="eos")
        if len(ids) >= limit:
            logp = None if reading.logp is None else reading.logp[:limit]
            stop: StopReason = "stop" if len(ids) == limit and reading.stop == "stop" else "length"
            return replace(reading, ids=ids[:limit], logp=logp, stop=stop)
        if reading.stop != "eos" or (ids and self._is_control(ids[-1]) and not no_end):
            return reading
        end = matched if isinstance(matched, int) and self._is_control(matched) else self.end_id
        # The log-probability of the end token is not known.
        return replace(reading, ids=(*ids, end), logp=None)

    def _is_control(self, token: int) -> bool:
        """Whether a token is no text: a server may end an answer at one that is not known to end any."""
        return token in self.eos_token_ids or token in control_ids(self.tokenizer)

    def _why(
        self, finish: str, ids: Sequence[int], matched: object, prompt: TokenPrompt, sampling: Sampling
    ) -> StopReason:
        if finish == "length":
            return "length"
        if not sampling.stop or any(token in self.eos_token_ids for token in ids):
            return "eos"
        if isinstance(matched, str) or StopStrings(self.tokenizer, sampling.stop).complete(ids):
            return "stop"
        if ids and self._is_control(ids[-1]):
            return "eos"
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
        text, finish = choice_text(choice, prompt), choice["finish_reason"]
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
                f"{self.vocab_size - 1}: it serves a model with another tokenizer than the {self.author}'s; serve the "
                f"{self.author}"
            )
