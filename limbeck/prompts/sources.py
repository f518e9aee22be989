"""Prompts from the built-in set, from files and from `datasets`, each once, split by a hash of its content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from limbeck.prompts.columns import ColumnTally
from limbeck.prompts.examples import ExampleReader, PlacedExample
from limbeck.prompts.formats import Example, Mapped, instruction_example
from limbeck.prompts.images import RowImages
from limbeck.prompts.readers import PlacedRow, rows_of
from limbeck.prompts.scratch import FiledPrompts, ScratchFile, ids_of
from limbeck.types import LimbeckError, Message, Prompt, Split

BUILTIN = "builtin"
Prompts = tuple[Prompt, ...] | FiledPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in the order of their ids (a hash: no order of the file survives), with the count of what was read.

    Attributes:
        rows: rows of the source.
        duplicates: examples dropped because their prompt had been read before.
        contradicted: those among them with another reference answer than the one that was kept.
        limited: prompts left out by `limit`, and held-out ones by a cap.
        unread: number of rows in which a column that is not read holds a value, by its name.
    """

    source: str
    prompts: Prompts
    rows: int
    duplicates: int
    contradicted: int
    limited: int
    unread: Mapping[str, int] = field(default_factory=dict)

    def of(self, split: Split) -> Prompts:
        """The prompts of one split."""
        if isinstance(self.prompts, FiledPrompts):
            return self.prompts.of(split)
        return tuple(prompt for prompt in self.prompts if prompt.split == split)

    @property
    def with_completion(self) -> int:
        """Prompts that carry a reference answer."""
        if isinstance(self.prompts, FiledPrompts):
            return self.prompts.answered
        return sum(prompt.answered for prompt in self.prompts)

    def counts(self) -> dict[str, int]:
        """Counts for the run's record and the console."""
        return {
            "rows": self.rows,
            "duplicates": self.duplicates,
            "contradicted": self.contradicted,
            "limited": self.limited,
            "train": len(self.of("train")),
            "heldout": len(self.of("heldout")),
            "with_completion": self.with_completion,
        }


def load_prompts(
    source: str,
    *,
    heldout_fraction: float | None,
    limit: int | None = None,
    split_seed: int = 0,
    fields: Mapping[Mapped, str] | None = None,
    dataset_split: str = "train",
    dataset_config: str | None = None,
    ignore_columns: Sequence[str] = (),
    rows: Iterable[PlacedRow] | None = None,
    rewrite: Callable[[PlacedRow], Mapping[str, Any]] | None = None,
    images: RowImages | None = None,
    seen_columns: Sequence[str] = (),
    distinct_columns: Collection[str] = (),
    scratch: ScratchFile | None = None,
) -> PromptSet:
    """Read a source and split it into training and held-out prompts.

    Two rows whose prompts differ in nothing but white space are one prompt, unless the teacher sees something else with
    each: the first is kept. The split of a prompt is a function of what is asked, `split_seed` and `heldout_fraction`
    alone, so no prompt is ever in both splits, and rows that are added, removed or reordered move no other row; a
    larger fraction only moves prompts to held-out.

    Args:
        source: "builtin"; a .jsonl, .json or .parquet file, a glob of them or a folder of them; a folder written by
            `datasets.save_to_disk`; a hub id.
        heldout_fraction: expected share of the held-out prompts, in (0, 1); 1 holds all of them out, to evaluate on,
            and None none, where they come from another source (`with_heldout`).
        limit: keep the prompts with the smallest hashes, so many; a smaller limit keeps a subset.
        fields: for data in none of the known formats, its own names of `prompt`, and of `completion` and `category`.
        dataset_split: the split of a `datasets` source, in its own words.
        dataset_config: its configuration, likewise.
        ignore_columns: columns to leave out as if they were not there.
        rows: read these instead of those of the source, which then is their name.
        rewrite: makes a row of one of the known formats of each row of the source.
        images: reads the images of rows; None refuses rows with any.
        seen_columns: columns that are kept with the prompt; every row must have them.
        distinct_columns: those of them by which one prompt is several.
        scratch: where the prompts are put, so that they are not in memory; None keeps them there.

    Raises:
        LimbeckError: a source that is absent, empty or malformed (naming file and line), rows of unknown or of several
            formats, a blank prompt, a column of a method that is not implemented, a split without prompts.
    """
    if heldout_fraction is not None and not 0.0 < heldout_fraction <= 1.0:
        raise LimbeckError(
            f"prompts.eval_fraction is {heldout_fraction}, expected a share between 0 and 1, both excluded"
        )
    if limit is not None and limit < 2:
        raise LimbeckError(f"prompts.limit is {limit}, expected at least 2 prompts: one to train on, one held out")
    if fields is not None and "prompt" not in fields:
        raise LimbeckError("prompts.fields names no field for 'prompt'; add prompt: NAME OF THE FIELD")
    columns = ColumnTally(ignore=ignore_columns, images=images is not None, seen=seen_columns)
    placed = rows_of(source, dataset_split, dataset_config) if rows is None else rows
    reading = ExampleReader(placed, fields, columns, images, rewrite)
    examples: Iterator[PlacedExample] = reading.examples()
    if source == BUILTIN:
        examples = (
            (replace(instruction_example(one.text or "", category=one.category), columns=one.columns), where)
            for one, where in examples
        )
    unique, repeated, contradicted = _unique(
        examples, heldout_fraction or 0.0, split_seed, scratch, frozenset(distinct_columns)
    )
    prompts = unique[:limit]
    loaded = PromptSet(
        source=source,
        prompts=prompts,
        rows=reading.rows,
        duplicates=repeated,
        contradicted=contradicted,
        limited=len(unique) - len(prompts),
        unread=dict(columns.unread),
    )
    if heldout_fraction is not None and heldout_fraction < 1.0:
        _require_both_splits(loaded, heldout_fraction)
    return loaded


def with_heldout(training: PromptSet, heldout: PromptSet) -> PromptSet:
    """The prompts of two sources, one to train on and one held out.

    Raises:
        LimbeckError: a prompt stands in both (white space aside), naming both places; or one source has none.
    """
    for loaded in (training, heldout):
        if not loaded.prompts:
            raise LimbeckError(f"{loaded.source}: no prompts; give a source with some")
    asked = set(_asked_ids(heldout.prompts))
    both = {name: place for place, name in enumerate(_asked_ids(training.prompts)) if name in asked}
    if both:
        first = next(prompt for prompt in heldout.prompts if asked_id(prompt) in both)
        raise LimbeckError(
            f"{first.where} asks what {training.prompts[both[asked_id(first)]].where} asks, so {len(both)} of "
            f"{len(heldout.prompts)} held-out prompts would be trained on; remove them from prompts.source or from "
            "prompts.heldout"
        )
    unread = Counter(training.unread)
    unread.update(heldout.unread)
    return PromptSet(
        source=training.source,
        prompts=_merged(training.prompts, heldout.prompts),
        rows=training.rows + heldout.rows,
        duplicates=training.duplicates + heldout.duplicates,
        contradicted=training.contradicted + heldout.contradicted,
        limited=training.limited,
        unread=dict(unread),
    )


def asked_id(prompt: Example | Prompt) -> str:
    """The id of what is asked, whatever the teacher sees with it."""
    return content_id(canonical_content(prompt))


def _asked_ids(prompts: Prompts) -> Iterator[str]:
    """`asked_id` of prompts, which are not made for it where they have no columns."""
    return map(asked_id, prompts) if any(prompt.columns for prompt in islice(prompts, 1)) else ids_of(prompts)


def _merged(training: Prompts, heldout: Prompts) -> Prompts:
    if isinstance(training, FiledPrompts) and isinstance(heldout, FiledPrompts):
        return training.merged(heldout)
    return tuple(sorted((*training, *heldout), key=lambda prompt: prompt.id))


def _unique(
    examples: Iterable[PlacedExample],
    heldout_fraction: float,
    split_seed: int,
    scratch: ScratchFile | None,
    distinct: frozenset[str],
) -> tuple[Prompts, int, int]:
    """One prompt of each content in the order of their ids, the number of further ones, and that of those among them
    that another answer was given to."""
    kept: list[Prompt] | ScratchFile = [] if scratch is None else scratch
    first = len(kept)
    # By half a hash, which is smaller than most prompts.
    places: dict[bytes, int] = {}
    repeated = contradicted = 0
    for example, where in examples:
        content = canonical_content(example)
        seen = {name: text for name, text in example.columns.items() if name in distinct}
        own = content + (json.dumps(seen, ensure_ascii=False, sort_keys=True) if seen else "")
        place = places.setdefault(hashlib.sha256(own.encode()).digest()[:16], len(kept))
        if place == len(kept):
            # By what is asked alone: a student must not be trained on what it is measured on.
            kept.append(prompt_of(example, own, where, split=split_of(content, heldout_fraction, split_seed)))
            continue
        repeated += 1
        contradicted += _answers(example) != _answers(kept[place])
    places.clear()  # before sorting takes its room
    if isinstance(kept, ScratchFile):
        return kept.since(first), repeated, contradicted
    return tuple(sorted(kept, key=lambda prompt: prompt.id)), repeated, contradicted


def prompt_of(example: Example, content: str, where: str, *, split: Split = "train") -> Prompt:
    """The prompt of an example by the content that tells it from others."""
    return Prompt(
        id=content_id(content),
        messages=example.messages,
        text=example.text,
        instruction=example.instruction,
        completion=example.completion,
        references=example.references,
        answer=example.answer,
        tools=example.tools,
        columns=example.columns,
        split=split,
        category=example.category,
        where=where,
    )


def _answers(one: Example | Prompt) -> tuple[str | None, tuple[str, ...], Message | None]:
    return one.completion, one.references, one.answer


def canonical_content(prompt: Example | Prompt) -> str:
    """Content of a prompt, whatever its format: its turns, runs of white space made one. A text is one user turn."""
    turns = prompt.messages or (Message(role="user", content=prompt.text or ""),)
    said: list[Any] = [[turn.role, _said_in(turn), *([turn.fields] if turn.fields else [])] for turn in turns]
    return json.dumps(said + ([{"tools": prompt.tools}] if prompt.tools else []), ensure_ascii=False)


def _said_in(turn: Message) -> str | list[Any]:
    """The text of a turn; with images its parts in order, each image by its id."""
    if not turn.parts:
        return " ".join(turn.content.split())
    return [" ".join(part.split()) if isinstance(part, str) else {"image": part.id} for part in turn.parts]


def content_id(content: str) -> str:
    """The id of a prompt: 16 hex digits of the sha256 of its canonical content."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def split_of(content: str, heldout_fraction: float, split_seed: int = 0) -> Split:
    """The split of a prompt: its own uniform number from sha256, against the fraction.

    The hash is salted, so that the split says nothing about the id, by which prompts are ordered and limited.
    """
    return "heldout" if split_number(content, split_seed) < heldout_fraction * 2**64 else "train"


def split_number(content: str, split_seed: int) -> int:
    """The uniform number of a prompt, below 2**64."""
    digest = hashlib.sha256(f"split {split_seed}\n{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _require_both_splits(loaded: PromptSet, heldout_fraction: float) -> None:
    counts = loaded.counts()
    for split in ("train", "heldout"):
        if not counts[split]:
            raise LimbeckError(
                f"{loaded.source}: {len(loaded.prompts)} prompts at prompts.eval_fraction {heldout_fraction} leave "
                f"none for {split}; give more prompts, or change prompts.eval_fraction or prompts.split_seed"
            )
