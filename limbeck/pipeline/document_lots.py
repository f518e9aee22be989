"""Plain text in lots: some documents of a source at a time, cut and counted by the rank of a launch that takes them.

    responses/batches/000007.arrow   the pieces of some documents, in the order of the source
    responses/batches/000007.json    what was counted there; without it the file counts as not written

A run that was stopped goes on with the lots that it lacks. No more of the source than a lot is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.student_endings import same_tokens
from limbeck.pipeline.text_only import load_student_tokenizer
from limbeck.prompts.documents import Document, TextSource, documents_of, lots_of, pieces_of
from limbeck.rollouts.registry import TextDocuments
from limbeck.rollouts.table import keep_columns
from limbeck.runtime.files import write_json
from limbeck.runtime.records import read_fields
from limbeck.runtime.shared_work import Share
from limbeck.types import LimbeckError, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(context: RunContext) -> PreTrainedTokenizerBase:
    """The tokenizer of the pair; of one with different tokens the student's."""
    return context.teacher.tokenizer if same_tokens(context) else load_student_tokenizer(context)


@dataclass(frozen=True)
class Corpus:
    """The text of a recipe."""

    context: RunContext

    @property
    def options(self) -> TextDocuments:
        options = self.context.recipe.responses.source
        assert isinstance(options, TextDocuments), "asked for where the source is text"
        return options

    @property
    def folder(self) -> Path:
        return self.context.run.responses / "batches"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.context)

    @property
    def training(self) -> TextSource:
        """The source, of which a share is held out unless another one is."""
        prompts, options = self.context.recipe.prompts, self.options
        return TextSource(
            name=prompts.source,
            field=options.text_field,
            dataset_split=prompts.dataset_split,
            dataset_config=prompts.dataset_config,
            streamed=options.max_tokens is not None,
        )

    @property
    def heldout(self) -> TextSource | None:
        name = self.context.recipe.prompts.heldout
        return None if name is None else replace(self.training, name=name, streamed=False)

    @cached_property
    def held(self) -> Mapping[str, tuple[int, str]]:
        """Number and place of each document of the held-out source, by its id; empty where it is a share."""
        if self.heldout is None:
            return {}
        seed = self.context.recipe.prompts.split_seed
        found = {d.id: (d.number(seed), d.where) for d in documents_of(self.heldout) if d is not None}
        if not found:
            raise LimbeckError(f"prompts.heldout={self.heldout.name} holds no text; give a source with some")
        return found

    def pieces(self, documents: Sequence[Document]) -> Iterator[list[Response]]:
        return pieces_of(documents, self.tokenizer, longest=self.context.recipe.responses.max_new_tokens)

    def record(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def columns(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"


@dataclass(frozen=True, kw_only=True)
class Lot:
    """What was counted in some documents of the source.

    Attributes:
        rows: of the source.
        blank: of these, without text.
        short: documents of one token, of which none can be predicted.
        tokens: predicted ones.
        heldout: numbers of the documents that a share would hold out, by id.
    """

    rows: int
    blank: int
    short: int
    tokens: int
    heldout: dict[str, int]


_LOT = {"rows": int, "blank": int, "short": int, "tokens": int, "heldout": dict}


def write_lots(corpus: Corpus, share: Share) -> int:
    """Write this process's share of the source in lots; the number of all of them, as far as they are read."""
    context, reached = corpus.context, _Reached(corpus)
    number = 0
    for number, lot in enumerate(lots_of(documents_of(corpus.training))):
        if reached.before(number):
            break
        if corpus.record(number).exists() or not share.take(number):
            continue
        with context.stop.deferred():
            _write_lot(corpus, number, lot, share)
            share.finish(number)
        context.stop.raise_if_requested()
    else:
        number += 1
    share.wait()
    # Others may have finished more than are needed.
    return reached.lots(number)


def _write_lot(corpus: Corpus, number: int, lot: Sequence[Document | None], share: Share) -> None:
    section = corpus.context.recipe.prompts
    documents = [document for document in lot if document is not None]
    for document in documents if corpus.held else ():
        _require_apart(corpus, document)
    share.step()
    numbers: dict[str, int] = {}
    short, every = 0, list[Response]()
    for document, pieces in zip(documents, corpus.pieces(documents), strict=True):
        if pieces and section.heldout is None:
            own = document.number(section.split_seed)
            numbers |= {pieces[0].prompt_id: own} if own < section.eval_fraction * 2**64 else {}
        short += not pieces
        every += pieces
    share.step()
    keep_columns(corpus.columns(number), every)
    counted = Lot(
        rows=len(lot),
        blank=len(lot) - len(documents),
        short=short,
        tokens=sum(piece.tokens for piece in every),
        heldout=numbers,
    )
    write_json(corpus.record(number), vars(counted))


def _require_apart(corpus: Corpus, document: Document) -> None:
    if document.id in corpus.held:
        where = corpus.held[document.id][1]
        raise LimbeckError(
            f"{where} is the text of {document.where}, white space aside, so held-out documents would be trained on; "
            "remove those that stand in both from prompts.source or from prompts.heldout"
        )


class _Reached:
    """Whether responses.source.max_tokens are in the lots that are written without a gap."""

    def __init__(self, corpus: Corpus):
        self.corpus, self.most = corpus, corpus.options.max_tokens
        self._next, self._tokens = 0, 0

    def before(self, number: int) -> bool:
        if self.most is None:
            return False
        while self._next < number and self._tokens < self.most and self.corpus.record(self._next).exists():
            self._tokens += read_lot(self.corpus, self._next).tokens
            self._next += 1
        return self._tokens >= self.most

    def lots(self, number: int) -> int:
        """How many lots of so many hold these tokens, and no more than needed; all where they do not."""
        return self._next if self.before(number) else number


def read_lot(corpus: Corpus, number: int) -> Lot:
    return Lot(**read_fields(corpus.record(number), _LOT))
