"""Fields of a server's reply in which the sampled tokens are.

Ids are taken from where the server has them, in this order; only the last has to be believed:

    token_ids                     vLLM, SGLang (return_token_ids)
    __verbose.tokens              llama.cpp (verbose, return_tokens)
    logprobs.tokens               "token_id:123": vLLM before return_token_ids; logprobs.content[].token in its chat
    logprobs.content[].id         llama.cpp before verbose, where no token was half a character: it merges those
    the text, tokenised again     everybody else; what was drawn may have been other tokens of the same text
"""

from __future__ import annotations

import re
from typing import Literal

from limbeck.client.replies import short_json
from limbeck.types import Json, LimbeckError, TokenPrompt, is_unicode

IdSource = Literal["token_ids", "logprobs", "text"]

_TOKEN_ID = re.compile(r"token_id:(\d+)")
_FINISHED = frozenset({"stop", "eos", "eos_token", "stop_sequence", "tool_calls"})


def choice_of(reply: Json, prompt: TokenPrompt) -> Json:
    """The first choice.

    Raises:
        LimbeckError: there is none, or it ended for a reason that makes it no answer.
    """
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    finish = choice.get("finish_reason") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(finish, str):
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server answers {short_json(reply)}, expected choices with a finish_reason; "
            "check that it is an OpenAI-compatible one"
        )
    if finish != "length" and finish not in _FINISHED:
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server ended with finish_reason {finish!r}, expected stop or length; "
            "drop the prompt, or look at the server's log"
        )
    return choice


def drawn(choice: Json, reply: Json) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None, IdSource]:
    """Ids with their log-probabilities, from wherever the server keeps ids."""
    logprobs, tokens, logp, entries = choice.get("logprobs"), None, None, []
    if isinstance(logprobs, dict):
        tokens, logp = logprobs.get("tokens"), _numbers(logprobs.get("token_logprobs"))
        if isinstance(logprobs.get("content"), list):
            entries = [entry for entry in logprobs["content"] if isinstance(entry, dict)]
            tokens, logp = [e.get("token") for e in entries], _numbers([e.get("logprob") for e in entries])
    for ids in (choice.get("token_ids"), _verbose(reply).get("tokens")):
        if (whole := whole_numbers(ids)) is not None:
            return whole, logp, "token_ids"
    matches = [_TOKEN_ID.fullmatch(str(token)) for token in tokens] if isinstance(tokens, list) else []
    if matches and all(matches):
        return tuple(int(match[1]) for match in matches if match), logp, "logprobs"
    if entries and (whole := whole_numbers([entry.get("id") for entry in entries])) is not None:
        return whole, logp, "logprobs"
    return None, None, "text"


def matched_by(choice: Json, reply: Json) -> object:
    """The stop string or token that ended it; None where the server does not say; -1 for an unnamed end token."""
    verbose = _verbose(reply)
    if verbose.get("stop_type") == "word":
        return verbose.get("stopping_word")
    if verbose.get("stop_type") == "eos":
        return -1
    return choice.get("stop_reason", choice.get("matched_stop"))


def _verbose(reply: Json) -> Json:
    verbose = reply.get("__verbose")
    return verbose if isinstance(verbose, dict) else {}


def choice_text(choice: Json, prompt: TokenPrompt) -> str:
    """Text of a choice.

    Raises:
        LimbeckError: there is none, or the server took a part out of it.
    """
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
            f"{prompt_name(prompt)}: the server answers {short_json(choice)}, expected a text; "
            "check that it is an OpenAI-compatible one"
        )
    if not is_unicode(text):
        raise LimbeckError(
            f"{prompt_name(prompt)}: the server's text holds half of a surrogate pair, which no tokenizer reads; "
            "use a server that returns token ids, such as vLLM"
        )
    return text


def whole_numbers(value: object) -> tuple[int, ...] | None:
    """A list of integers as a tuple; None for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return None
    return tuple(value)


def _numbers(value: object) -> tuple[float, ...] | None:
    if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
        return None
    return tuple(float(item) for item in value)


def count_of(reply: Json, name: str) -> int | None:
    """A number of tokens that the server counted; None where it did not."""
    usage = reply.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def prompt_name(prompt: TokenPrompt) -> str:
    """Name of a prompt in messages."""
    return f"prompt {prompt.label or prompt.id}"
