"""Requests for log-probabilities of given tokens, and where the answers of each kind of server have them.

    vllm      /v1/completions with prompt_logprobs: the likeliest tokens of every position of a text, and its own tokens
    sglang    /generate with top_logprobs_num: the same
    llamacpp  /completion with n_probs: the likeliest tokens of the position behind a text, so one request a token; the
              text's own token only where it is among them

Where tokens are chosen for each position, see `served_choice`. The shapes of vLLM and SGLang are those of 0.32.0 and
0.5.23. All are normalised over the whole vocabulary at
temperature 1, so that what is left to 1 is the mass of all other tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from limbeck.client.replies import short_json
from limbeck.types import Json

# How vLLM writes minus infinity, which JSON cannot.
_NOTHING = -9999.0
_CAP = re.compile(r"max allowed: (\d+)")
# One position's log-probabilities by token id.
Candidates = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A text whose tokens are to be scored.

    Attributes:
        ids: from its first token to the last one that is scored.
        positions: places of the scored tokens in `ids`, ascending, from 1: each is predicted from all before it.
        chosen: for each of them, tokens that are wanted beside the likeliest; empty where none are.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    chosen: tuple[tuple[int, ...], ...] = ()

    @property
    def labels(self) -> tuple[int, ...]:
        """The scored tokens themselves."""
        return tuple(self.ids[position] for position in self.positions)


class ScoringDialect(Protocol):
    """One way to ask a server for log-probabilities.

    Attributes:
        path: where the requests go; with two slashes beside /v1.
        scores_labels: whether the text's own tokens are always among the answer's.
    """

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def scores_labels(self) -> bool: ...

    def requests(self, text: ScoredText, model: str, count: int) -> list[Json]:
        """The requests for the `count` likeliest tokens of each position."""
        ...

    def read(self, replies: Sequence[Json], text: ScoredText) -> list[Candidates]:
        """The log-probabilities of each position.

        Raises:
            ValueError: the replies have another shape; says which.
        """
        ...


@dataclass(frozen=True)
class VllmScoring:
    """vLLM: `prompt_logprobs` of a text with one token behind it that is thrown away."""

    name = "vllm"
    path = "/completions"
    scores_labels = True

    def requests(self, text: ScoredText, model: str, count: int) -> list[Json]:
        ids = list(text.ids)
        return [{"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": count}]

    def read(self, replies: Sequence[Json], text: ScoredText) -> list[Candidates]:
        choices = replies[0].get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        rows = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
        return [vllm_row(row) for row in from_the_end(rows, text, "prompt_logprobs")]


def vllm_row(row: object) -> Candidates:
    if not isinstance(row, dict):
        raise ValueError(f"{short_json(row)} for a position, expected log-probabilities by token id")
    values = {int(name): entry.get("logprob") if isinstance(entry, dict) else None for name, entry in row.items()}
    return {token: _number(value) for token, value in values.items()}


@dataclass(frozen=True)
class SglangScoring:
    """SGLang: its own endpoint, which gives log-probabilities of the input from a position on."""

    name = "sglang"
    path = "//generate"
    scores_labels = True

    def requests(self, text: ScoredText, model: str, count: int) -> list[Json]:
        return [
            {
                "input_ids": list(text.ids),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": text.positions[0] - 1,
                "top_logprobs_num": count,
            }
        ]

    def read(self, replies: Sequence[Json], text: ScoredText) -> list[Candidates]:
        meta = replies[0].get("meta_info")
        meta = meta if isinstance(meta, dict) else {}
        own = from_the_end(meta.get("input_token_logprobs"), text, "meta_info.input_token_logprobs")
        top = from_the_end(meta.get("input_top_logprobs"), text, "meta_info.input_top_logprobs")
        rows: list[Candidates] = [triples(best) | triples([label]) for best, label in zip(top, own, strict=True)]
        for label, sent in zip(own, text.labels, strict=True):
            if label[1] != sent:
                raise ValueError(f"token {label[1]} where {sent} was sent")
        return rows


def triples(rows: object) -> dict[int, float]:
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) >= 2 for row in rows):
        raise ValueError(f"{short_json(rows)} for a position, expected [log-probability, token id, ...]")
    return {_whole(row[1]): _number(row[0]) for row in rows}


@dataclass(frozen=True)
class LlamaCppScoring:
    """llama.cpp: the likeliest tokens behind a text; each request reads one token more, the others are in its cache."""

    name = "llamacpp"
    path = "//completion"
    scores_labels = False

    def requests(self, text: ScoredText, model: str, count: int) -> list[Json]:
        del model
        # Its probabilities are those before any sampler: of temperature 1, over the whole vocabulary.
        common = {"n_predict": 1, "n_probs": count, "temperature": 0.0, "cache_prompt": True, "return_tokens": True}
        # It leaves them out beside half a character: what it draws, and is thrown away, is a letter.
        common |= {"logit_bias": [["a", 1000.0]]}
        return [common | {"prompt": list(text.ids[:position])} for position in text.positions]

    def read(self, replies: Sequence[Json], text: ScoredText) -> list[Candidates]:
        return [self._row(reply) for reply in replies]

    def _row(self, reply: Json) -> Candidates:
        drawn = reply.get("completion_probabilities")
        first = drawn[0] if isinstance(drawn, list) and drawn else None
        best = first.get("top_logprobs") if isinstance(first, dict) else None
        if not isinstance(best, list) or not all(isinstance(entry, dict) for entry in best):
            raise ValueError(f"{short_json(reply)}, expected completion_probabilities with top_logprobs")
        return {_whole(entry.get("id")): _number(entry.get("logprob")) for entry in best}


DIALECTS: tuple[ScoringDialect, ...] = (VllmScoring(), SglangScoring(), LlamaCppScoring())


def cap_of(message: str) -> int | None:
    """The most log-probabilities a position that a server gives, from its refusal of more; None where it says none."""
    found = _CAP.search(message)
    return None if found is None else int(found[1])


def from_the_end(rows: object, text: ScoredText, name: str) -> list[Any]:
    """The rows of the scored tokens out of those of the last tokens of the text, however many these are."""
    if not isinstance(rows, list):
        raise ValueError(f"no {name}")
    missing = len(text.ids) - len(rows)
    if missing > text.positions[0]:
        raise ValueError(
            f"{name} of {len(rows)} tokens, expected the last {len(text.ids) - text.positions[0]} at least"
        )
    if missing < 0:
        raise ValueError(f"{name} of {len(rows)} tokens for a text of {len(text.ids)}")
    return [rows[position - missing] for position in text.positions]


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{short_json(value)} where a token id belongs")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{short_json(value)} where a log-probability belongs")
    return -math.inf if value <= _NOTHING else float(value)


def check_candidates(rows: Sequence[Candidates], text: ScoredText, *, rows_of_head: int) -> None:
    """Check that numbers are what a server says them to be: log-probabilities of tokens that there are.

    Raises:
        ValueError: a log-probability above 0 or NaN, a distribution of more than 1, an id out of range.
    """
    if len(rows) != len(text.positions):
        raise ValueError(f"{len(rows)} positions, expected {len(text.positions)}")
    for row in rows:
        for token, logp in row.items():
            if not 0 <= token < rows_of_head:
                raise ValueError(f"token id {token}, expected 0 to {rows_of_head - 1}")
            if math.isnan(logp) or logp > 1e-4:
                raise ValueError(f"{logp} as the log-probability of token {token}, expected at most 0")
        mass = math.fsum(math.exp(logp) for logp in row.values())
        if mass > 1.001:
            raise ValueError(f"probabilities of one position that add up to {mass:.4g}, expected at most 1")
