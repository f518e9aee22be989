"""Documents of plain text: read one by one, known by a hash, and cut into responses of a length.

A document is its text and the tokenizer's end of sequence, and becomes one response for each so many tokens. Each is
learnt from behind the one token before it (and the beginning of sequence, where the tokenizer has one), so that every
token of a document but its first is predicted once, and never from another document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from limbeck.prompts.fields import quoted, text_in
from limbeck.prompts.readers import PlacedRow, rows_of
from limbeck.prompts.sources import canonical_content, content_id, split_number
from limbeck.types import LimbeckError, Prompt, Response, Split, shared_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns by which rows of prompts are known.
_OF_PROMPTS = ("prompt", "messages", "conversations", "instruction", "question", "problem")
# What stands for the prompts where a template is chosen by them.
RAW_TEXT = (Prompt(id="", text=""),)
# Documents that are tokenised in one call, and the characters after which there are no more of them.
LOT = 1000
LOT_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Where rows of plain text come from.

    Attributes:
        name: a file, a folder or a glob of them, a `datasets` folder or a hub id.
        field: the column that holds the text.
        dataset_split, dataset_config: of a `datasets` source.
        keys: the section of the recipe that names it.
        field_key: the key that names the column.
        streamed: fetch no more of a hub data set than is read.
    """

    name: str
    field: str = "text"
    dataset_split: str = "train"
    dataset_config: str | None = None
    keys: str = "prompts"
    field_key: str = "responses.source.text_field"
    streamed: bool = False


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text that is not blank.

    Attributes:
        where: its place in the source, for messages.
    """

    text: str
    where: str

    @cached_property
    def content(self) -> str:
        """What it is known by: the same whatever its white space, as for prompts."""
        return canonical_content(Prompt(id="", text=self.text))

    @cached_property
    def id(self) -> str:
        return content_id(self.content)

    def number(self, split_seed: int) -> int:
        """Its uniform number below 2**64: the smallest are held out."""
        return split_number(self.content, split_seed)


def documents_of(source: TextSource) -> Iterator[Document | None]:
    """The documents of a source in its order, one at a time; None for each row whose text is blank.

    Raises:
        LimbeckError: a row without the column, a text that is none, or what `rows_of` raises.
    """
    rows = rows_of(source.name, source.dataset_split, source.dataset_config, keys=source.keys, streamed=source.streamed)
    for placed in rows:
        text = _text_of(placed, source)
        yield Document(text=text, where=placed.where) if text.strip() else None


def lots_of(documents: Iterator[Document | None]) -> Iterator[list[Document | None]]:
    """Some documents at a time: no more than `LOT`, and those of very long texts fewer."""
    lot: list[Document | None] = []
    characters = 0
    for document in documents:
        lot.append(document)
        characters += 0 if document is None else len(document.text)
        if len(lot) == LOT or characters >= LOT_CHARACTERS:
            yield lot
            lot, characters = [], 0
    if lot:
        yield lot


def _text_of(placed: PlacedRow, source: TextSource) -> str:
    if source.field not in placed.row:
        found = ", ".join(quoted(str(name)) for name in sorted(map(str, placed.row))) or "none"
        prompts = source.keys == "prompts" and any(name in placed.row for name in _OF_PROMPTS)
        more = "; rows of prompts are read with responses.source=teacher, or data for their answers" if prompts else ""
        raise LimbeckError(
            f"{placed.where}: got the fields {found}, expected {source.field!r}, which holds the text; "
            f"name the right one with {source.field_key}{more}"
        )
    return text_in(placed.row, source.field, placed.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """A document in tokens.

    Attributes:
        begin: what the tokenizer puts before every text; empty for many.
        ids: the text's, with the end of sequence.
    """

    begin: tuple[int, ...]
    ids: tuple[int, ...]

    def cut(self, longest: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The context and the predicted tokens of each piece, at most `longest` of the latter."""
        start = 0 if self.begin else 1
        for at in range(start, len(self.ids), longest):
            yield (*self.begin, *self.ids[max(at - 1, 0) : at]), self.ids[at : at + longest]


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokenized]:
    """Documents in tokens. Text that spells a control token is text."""
    if not texts:
        return []
    begin = beginning_of(tokenizer)
    end: Any = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return [Tokenized(begin=begin, ids=shared_ids((*ids, *end))) for ids in encoded["input_ids"]]


def beginning_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The beginning of sequence, where the tokenizer puts one before every text."""
    around: Any = tokenizer("", verbose=False)["input_ids"]
    return (int(around[0]),) if around and around[0] == tokenizer.bos_token_id else ()


def pieces_of(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, longest: int, split: Split = "train"
) -> Iterator[list[Response]]:
    """The pieces of each document as responses of the data, under the document's id.

    Args:
        longest: predicted tokens of a piece.
    """
    for document, found in zip(documents, tokenized([d.text for d in documents], tokenizer), strict=True):
        cuts = list(found.cut(longest))
        ended = tokenizer.eos_token_id is not None
        yield [
            Response(
                prompt_id=document.id,
                author="data",
                prompt_ids=before,
                response_ids=ids,
                stop="eos" if ended and place == len(cuts) else "length",
                split=split,
            )
            for place, (before, ids) in enumerate(cuts, start=1)
        ]


def first_text(source: TextSource) -> None:
    """See that a source begins with rows of text.

    Raises:
        LimbeckError: it does not.
    """
    next(documents_of(source), None)
