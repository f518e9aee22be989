"""Pairs from several answers to each prompt: the best and the worst by a score, and the count of what is left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.rollouts.io import fields_of, response_from_json
from limbeck.runtime.files import write_text
from limbeck.runtime.json_lines import json_lines
from limbeck.types import LimbeckError, Response

# What is left out, by the name of its count, as messages and the report say it.
LEFT_OUT: dict[str, str] = {
    "answers_empty": "answers that are nothing but their end",
    "answers_repeated": "answers that repeat another one of their prompt",
    "prompts_one_answer": "prompts without two different answers",
    "prompts_tied": "prompts whose answers are all ties",
    "prompts_unread": "prompts of which the judge's verdict could not be read",
    "rows_heldout": "rows whose prompt is held out",
    "rows_identical": "rows whose two answers are the same",
    "rows_too_long": "rows whose prompt is too long",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two answers to a prompt.

    Attributes:
        scores: of the two, by the model that ranked them; None where the data did.
    """

    chosen: Response
    rejected: Response
    scores: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """The pairs of a run, with the count of what they were made from.

    Attributes:
        left_out: how much was left out, by the names of `LEFT_OUT`.
        prompts: training prompts that were answered, or rows of the data.
        answers: answers to them.
    """

    pairs: tuple[PreferencePair, ...]
    left_out: Mapping[str, int]
    prompts: int
    answers: int


def rankable(answers: Mapping[str, Sequence[Response]]) -> tuple[dict[str, list[Response]], Counter[str]]:
    """The different answers of each prompt that has at least two, and the count of what is left out.

    Args:
        answers: by prompt id.
    """
    found: dict[str, list[Response]] = {}
    left_out: Counter[str] = Counter()
    for prompt_id, given in answers.items():
        whole = [response for response in given if not _is_empty(response)]
        first: dict[tuple[int, ...], Response] = {}
        for response in whole:
            first.setdefault(response.response_ids, response)
        different = list(first.values())
        left_out["answers_empty"] += len(given) - len(whole)
        left_out["answers_repeated"] += len(whole) - len(different)
        if len(different) < 2:
            left_out["prompts_one_answer"] += 1
        else:
            found[prompt_id] = different
    return found, left_out


def best_and_worst(
    answers: Mapping[str, Sequence[Response]], scores: Mapping[str, float | None], *, margin: float = 0.0
) -> tuple[list[PreferencePair], Counter[str]]:
    """A pair for each prompt: its answers with the highest and the lowest score, the first of equal ones.

    Args:
        answers: at least two different ones for each prompt.
        scores: by response id; None where one could not be had, which leaves the prompt out.
        margin: scores that are no further apart are a tie, which is left out.
    """
    pairs: list[PreferencePair] = []
    left_out: Counter[str] = Counter()
    for given in answers.values():
        known = [(score, response) for response in given if (score := scores[response.id]) is not None]
        if len(known) < len(given):
            left_out["prompts_unread"] += 1
            continue
        best, chosen = max(known, key=lambda one: one[0])
        worst, rejected = min(known, key=lambda one: one[0])
        if best - worst <= margin:
            left_out["prompts_tied"] += 1
        else:
            pairs.append(PreferencePair(chosen=chosen, rejected=rejected, scores=(best, worst)))
    return pairs, left_out


def in_words(left_out: Mapping[str, Any]) -> str:
    """What was left out, as a list in words; empty where nothing was."""
    return ", ".join(f"{count} {LEFT_OUT[name]}" for name, count in left_out.items() if name in LEFT_OUT and count)


def write_pairs(path: Path, pairs: Sequence[PreferencePair]) -> None:
    """Write pairs, one JSON object per line, each answer with its ids exactly as sampled; all or nothing."""
    lines = (
        {
            "chosen_id": pair.chosen.id,
            "rejected_id": pair.rejected.id,
            "scores": pair.scores,
            "chosen": fields_of(pair.chosen),
            "rejected": fields_of(pair.rejected),
        }
        for pair in pairs
    )
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_pairs(path: Path) -> list[PreferencePair]:
    """The pairs of `write_pairs`.

    Raises:
        LimbeckError: a damaged line, with its number.
    """
    return [_read(line, path, number) for number, line in json_lines(path.read_text("utf-8"))]


def _read(line: str, path: Path, number: int) -> PreferencePair:
    try:
        row: dict[str, Any] = json.loads(line)
        scores = row["scores"]
        pair = PreferencePair(
            chosen=response_from_json(row["chosen"]),
            rejected=response_from_json(row["rejected"]),
            scores=None if scores is None else (float(scores[0]), float(scores[1])),
        )
        if (pair.chosen.id, pair.rejected.id) != (row["chosen_id"], row["rejected_id"]):
            raise ValueError("an answer is not the one that its id names")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LimbeckError(
            f"{path}:{number} is damaged ({error}); delete {path} and run the same command again"
        ) from None
    return pair


def _is_empty(response: Response) -> bool:
    """Nothing, or nothing but the end."""
    return response.tokens <= (response.stop == "eos")
