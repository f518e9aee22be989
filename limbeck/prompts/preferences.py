"""Rows of preference data: a prompt and two answers, `chosen` and `rejected`, in the formats that prompts have.

prompt chosen rejected                  text, or lists of messages (TRL)
chosen rejected                         whole conversations that differ in their last turn (TRL, UltraFeedback)
instruction [input | context] chosen rejected; question chosen rejected; problem chosen rejected
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.prompts.fields import quoted, shown_value
from limbeck.prompts.formats import Example, family_of, read_row
from limbeck.prompts.readers import PlacedRow, rows_of
from limbeck.prompts.sources import canonical_content, content_id, prompt_of, split_of
from limbeck.types import LimbeckError, Message, Prompt

ANSWERS = ("chosen", "rejected")
# The field of a prompt, with the one that holds an answer beside it.
_BESIDE = {"instruction": "output", "question": "answer", "problem": "solution", "prompt": "completion"}
_OF_PROMPTS = ("instruction", "input", "context", "question", "problem", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Rows of preference data.

    Attributes:
        rows: each as two prompts, with the chosen and the rejected answer as the reference answer.
        heldout: rows left out because their prompt is held out.
        identical: rows left out because their two answers are the same.
    """

    rows: tuple[tuple[Prompt, Prompt], ...]
    heldout: int
    identical: int


def read_preferences(
    source: str,
    *,
    heldout_fraction: float,
    split_seed: int = 0,
    heldout_ids: Collection[str] = (),
    dataset_split: str = "train",
    dataset_config: str | None = None,
    identical: Literal["error", "drop"] = "error",
) -> Preferences:
    """Read preference data; rows whose prompt is held out, by the same hash as all prompts, are left out.

    Args:
        heldout_fraction: 0 where the held-out prompts come from a source of their own.
        heldout_ids: `asked_id` of prompts that are held out whatever their hash.

    Raises:
        LimbeckError: a row without two answers to one prompt, or with one answer twice, naming its place; no row left.
    """
    rows: list[tuple[Prompt, Prompt]] = []
    every = heldout = same = 0
    for placed in rows_of(source, dataset_split, dataset_config, keys="preference.pairs"):
        every += 1
        chosen, rejected = _answers_of(placed)
        content = canonical_content(chosen)
        if canonical_content(rejected) != content:
            raise LimbeckError(
                f"{placed.where}: 'chosen' and 'rejected' answer different prompts; expected two answers to one: "
                "correct the row or remove it"
            )
        if _said(chosen) == _said(rejected):
            if identical == "error":
                raise LimbeckError(
                    f"{placed.where}: 'chosen' and 'rejected' are one answer twice; remove the row, or set "
                    "preference.pairs.identical=drop to leave such rows out"
                )
            same += 1
        elif content_id(content) in heldout_ids or split_of(content, heldout_fraction, split_seed) == "heldout":
            heldout += 1
        else:
            rows.append((prompt_of(chosen, content, placed.where), prompt_of(rejected, content, placed.where)))
    if not rows:
        raise LimbeckError(
            f"{source}: none of {every} rows gives a pair ({heldout} have a held-out prompt, {same} one answer twice); "
            "give other data in preference.pairs.source, or lower prompts.eval_fraction"
        )
    return Preferences(rows=tuple(rows), heldout=heldout, identical=same)


@contextmanager
def while_reading(answer: str) -> Iterator[None]:
    """Let an error in the block, which knows of one answer alone, say which of the two it was."""
    try:
        yield
    except LimbeckError as error:
        raise LimbeckError(f"{error} (the answer in {answer!r})") from None


def _said(example: Example) -> tuple[str, Message | None]:
    return (example.completion or "").strip(), example.answer


def _answers_of(placed: PlacedRow) -> tuple[Example, Example]:
    row = placed.row
    missing = [name for name in ANSWERS if row.get(name) in (None, "", [])]
    if missing:
        got = ", ".join(quoted(name) for name in sorted(row)) or "none"
        raise LimbeckError(
            f"{placed.where}: nothing in {missing[0]!r} (the fields are {got}); expected a prompt with 'chosen' and "
            "'rejected': repair the row, or let others prefer with preference.pairs=teacher"
        )
    found: list[Example] = []
    for name in ANSWERS:
        if not isinstance(row[name], str | list):
            raise LimbeckError(
                f"{placed.where}: got {shown_value(row[name])} in {name!r}, expected text or a list of messages; "
                "repair the row"
            )
        plain = _with_answer(row, row[name])
        with while_reading(name):
            (example,) = read_row(plain, family_of(plain, placed.where), placed.where)
        if example.completion is None and example.answer is None:
            raise LimbeckError(f"{placed.where}: {name!r} is blank; fill it in or remove the row")
        found.append(example)
    return found[0], found[1]


def _with_answer(row: Mapping[str, Any], answer: Any) -> dict[str, Any]:
    """A row of prompts with one of the answers, without what has nothing to do with either."""
    kept = {name: row[name] for name in ("tools",) if row.get(name) is not None}
    conversation = isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) > 1
    field = next((name for name in _BESIDE if row.get(name) is not None), None)
    if conversation or field is None:
        return kept | {"messages": answer}
    return kept | {name: row[name] for name in _OF_PROMPTS if row.get(name) is not None} | {_BESIDE[field]: answer}
