"""Requests for the log-probabilities of tokens that are chosen for each position, beside the likeliest ones.

    vllm      /inference/v1/generate (started with --enable-scale-out, on a GPU): a list of ids for each position
    sglang    /generate with token_ids_logprob: one list for all positions of a request, so that some positions at a
              time are asked about, each with what is chosen for any of them; the server has their beginning cached

The shapes are those of 0.32.0 and 0.5.23.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from limbeck.client.replies import short_json
from limbeck.teachers.served_dialects import (
    Candidates,
    ScoredText,
    ScoringDialect,
    SglangScoring,
    from_the_end,
    triples,
    vllm_row,
)
from limbeck.types import Json

if TYPE_CHECKING:
    import numpy.typing as npt

# Positions of one request to SGLang: each says what is chosen for all of them.
_TOGETHER = 8


@dataclass(frozen=True)
class VllmChoice:
    """vLLM: scores of a list of ids for each position, as an array in the answer."""

    name = "vllm"
    path = "//inference/v1/generate"
    scores_labels = True

    def requests(self, text: ScoredText, model: str, count: int) -> list[Json]:
        first, chosen = text.positions[0], dict(zip(text.positions, text.chosen, strict=True))
        rows = [list(chosen.get(position, ())) for position in range(first, len(text.ids))]
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": count,
            "prompt_logprob_start": first - 1,
            "prompt_logprob_token_ids": rows,
        }
        return [{"model": model, "token_ids": list(text.ids), "sampling_params": sampling}]

    def read(self, replies: Sequence[Json], text: ScoredText) -> list[Candidates]:
        reply = replies[0]
        best = [vllm_row(row) for row in from_the_end(reply.get("prompt_logprobs"), text, "prompt_logprobs")]
        first, scores = text.positions[0], _array(reply.get("prompt_token_id_logprobs"))
        wide = max(map(len, text.chosen))
        if scores.shape != (len(text.ids) - first, wide):
            raise ValueError(
                f"prompt_token_id_logprobs of shape {scores.shape}, expected {(len(text.ids) - first, wide)}"
            )
        pairs = zip(text.positions, text.chosen, strict=True)
        rows = [scores[position - first, : len(own)].tolist() for position, own in pairs]
        return [
            {**dict(zip(own, row, strict=True)), **likeliest}
            for own, row, likeliest in zip(text.chosen, rows, best, strict=True)
        ]


def _array(said: object) -> npt.NDArray[Any]:
    """An array as vLLM sends it: a .npy file in base64.

    Raises:
        ValueError: it is none.
    """
    import numpy as np

    if not isinstance(said, str):
        raise ValueError(f"prompt_token_id_logprobs {short_json(said)}, expected an array")
    try:
        found = np.load(io.BytesIO(base64.b64decode(said, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError) as error:
        raise ValueError(f"prompt_token_id_logprobs that are no array ({error})") from None
    if found.ndim != 2 or found.dtype.kind != "f":
        raise ValueError(f"prompt_token_id_logprobs of {found.dtype} and shape {found.shape}, expected two dimensions")
    return found


@dataclass(frozen=True)
class SglangChoice:
    """SGLang: some positions at a time, with one list of ids for all of them."""

    name = "sglang"
    path = "//generate"
    scores_labels = True

    def requests(self, text: ScoredText, model: str, count: int) -> list[Json]:
        return [
            request | {"token_ids_logprob": sorted({token for own in part.chosen for token in own})}
            for part in _parts(text)
            for request in SglangScoring().requests(part, model, count)
        ]

    def read(self, replies: Sequence[Json], text: ScoredText) -> list[Candidates]:
        rows: list[Candidates] = []
        for reply, part in zip(replies, _parts(text), strict=True):
            meta = reply.get("meta_info")
            said = meta.get("input_token_ids_logprobs") if isinstance(meta, dict) else None
            asked = [triples(row) for row in from_the_end(said, part, "meta_info.input_token_ids_logprobs")]
            for best, scored, own in zip(SglangScoring().read([reply], part), asked, part.chosen, strict=True):
                if missing := [token for token in own if token not in scored]:
                    raise ValueError(f"no log-probability of token {missing[0]}, which was asked for")
                rows.append({token: scored[token] for token in own} | dict(best))
        return rows


def _parts(text: ScoredText) -> Iterator[ScoredText]:
    """A text up to some positions at a time, which are scored."""
    for start in range(0, len(text.positions), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        positions = text.positions[some]
        yield replace(text, ids=text.ids[: positions[-1] + 1], positions=positions, chosen=text.chosen[some])


# Those that can be asked for tokens of each position.
CHOOSING_DIALECTS: tuple[ScoringDialect, ...] = (VllmChoice(), SglangChoice())
