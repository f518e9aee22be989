"""The responses of a corpus of plain text: its documents in pieces, held-out ones chosen by their hashes.

Documents are cut in lots, which ranks share (`limbeck.pipeline.document_lots`), and joined in the order of the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.document_lots import Corpus, read_lot, tokenizer_of, write_lots
from limbeck.pipeline.student_endings import same_tokens
from limbeck.prompts.documents import RAW_TEXT, beginning_of, documents_of, first_text, lots_of
from limbeck.prompts.readers import is_path
from limbeck.prompts.templates import resolve_template
from limbeck.recipe.document_checks import require_no_prompts
from limbeck.recipe.keys import fingerprinted_member
from limbeck.rollouts.options import SOURCE_KEY
from limbeck.rollouts.table import ResponseTable, keep_responses, open_responses
from limbeck.runtime.shared_work import Job
from limbeck.types import Json, LimbeckError, Response, Split


def document_inputs(context: RunContext) -> Json:
    """Inputs of the responses beside those of any source."""
    if not context.recipe.documents:
        return {}
    return {"documents": fingerprinted_member(SOURCE_KEY, context.recipe.responses.source)}


def check_documents(context: RunContext) -> None:
    """Check that the sources hold text, that its pieces fit the pair, and that nothing asks for prompts, as far as
    possible without a network.

    Raises:
        LimbeckError: they do not.
    """
    if not context.recipe.documents:
        return
    require_no_prompts(context.recipe)
    window, longest = context.window, context.recipe.responses.max_new_tokens
    before = 1 + len(beginning_of(tokenizer_of(context)))
    if window is not None and longest > window - before:
        raise LimbeckError(
            f"responses.max_new_tokens is {longest} and the window of the pair {window} tokens; a piece of text stands "
            f"behind {before} more, so lower it to {window - before} or less"
        )
    corpus = Corpus(context)
    for source in filter(None, (corpus.training, corpus.heldout)):
        if is_path(source.name):
            first_text(source)


def respond_with_documents(context: RunContext) -> Json:
    """Write the pieces of all documents; the record for the manifest."""
    corpus = Corpus(context)
    with context.work.posted("documents", {}) as share:
        lots = write_lots(corpus, share)
    joined = _Joined(corpus, lots)
    keep_responses(context.run.responses / "data.jsonl", joined.responses())
    for line in joined.said():
        context.console.say(line)
    template = resolve_template(context.recipe.prompts.template, corpus.tokenizer, RAW_TEXT)
    own = {} if same_tokens(context) else {"tokens_of": "student"}
    return {"template": template, **joined.record(), **own}


def help_with_documents(context: RunContext, job: Job) -> None:
    """Another rank's share of the documents."""
    write_lots(Corpus(context), job)


@dataclass
class _Joined:
    """The lots of a source in one.

    Attributes:
        lots: their number.
        counts: of documents, pieces and tokens, by (what, split), as they pass.
    """

    corpus: Corpus
    lots: int
    counts: Counter[tuple[str, Split]] = field(default_factory=Counter)

    def responses(self) -> Iterator[Response]:
        """All pieces, those of a held-out source last.

        Raises:
            LimbeckError: too few to train on, or none held out.
        """
        for table in self._tables:
            yield from self._counted(table)
        yield from self._counted(self._of_heldout_source())
        self._require_enough()

    def record(self) -> Json:
        """What was read, cut and left out."""
        read = self._read
        return {
            "rows": read["rows"],
            "blank": read["blank"],
            "too_short": read["short"],
            "responses": self._of("pieces", "train") + self._of("pieces", "heldout"),
            "tokens": self._of("tokens", "train") + self._of("tokens", "heldout"),
            "train": self._of("documents", "train"),
            "heldout": self._of("documents", "heldout"),
        }

    def said(self) -> Iterator[str]:
        """Lines for the console."""
        sides: dict[Split, str] = {"train": "to train on", "heldout": "held out"}
        said = (
            f"{self._of('documents', split):,} documents of {self._of('tokens', split):,} tokens {how}"
            for split, how in sides.items()
        )
        yield f"respond: {', '.join(said)}, in pieces of up to {self._longest} tokens"
        left_out = {"rows without text": self._read["blank"], "documents of a single token": self._read["short"]}
        if lines := [f"{count:,} {what}" for what, count in left_out.items() if count]:
            yield f"respond: {' and '.join(lines)} left out"

    @property
    def _longest(self) -> int:
        return self.corpus.context.recipe.responses.max_new_tokens

    def _of(self, what: str, split: Split) -> int:
        return self.counts[what, split]

    @cached_property
    def _read(self) -> Counter[str]:
        """What the lots have counted."""
        every = (read_lot(self.corpus, number) for number in range(self.lots))
        return sum((Counter(rows=lot.rows, blank=lot.blank, short=lot.short) for lot in every), Counter())

    @cached_property
    def _tables(self) -> list[ResponseTable]:
        """The pieces of each lot; of the last one as many as end with the document that reaches the limit."""
        tables = [open_responses(self.corpus.columns(number)) for number in range(self.lots)]
        most = self.corpus.options.max_tokens
        if most is None or not tables:
            return tables
        left = most - sum(int(table.answer_lengths.sum()) for table in tables[:-1])
        *whole, last = tables
        within = int(np.searchsorted(np.cumsum(last.answer_lengths), left)) + 1
        names = list(last.prompt_ids)
        while within < len(names) and names[within] == names[within - 1]:
            within += 1
        return [*whole, last[:within]]

    @cached_property
    def _heldout(self) -> frozenset[str]:
        """The documents that are held out: all candidates, or those of the smallest numbers."""
        numbers = {name: number for name, (number, _) in self.corpus.held.items()}
        for number, table in enumerate(self._tables):
            candidates = read_lot(self.corpus, number).heldout
            # Not all documents of the last lot may be within the limit of tokens.
            reached = {*table.prompt_ids} if number == self.lots - 1 else candidates
            numbers |= {name: own for name, own in candidates.items() if name in reached}
        chosen = sorted(numbers, key=lambda name: (numbers[name], name))
        return frozenset(chosen[: self.corpus.context.recipe.prompts.eval_limit])

    def _counted(self, responses: Iterable[Response]) -> Iterator[Response]:
        # The same text may stand in a source twice in a row.
        before, ended = "", False
        for response in responses:
            split: Split = "heldout" if response.prompt_id in self._heldout else "train"
            self.counts["pieces", split] += 1
            self.counts["tokens", split] += response.tokens
            self.counts["documents", split] += ended or response.prompt_id != before
            before, ended = response.prompt_id, response.stop == "eos"
            yield replace(response, split=split)

    def _of_heldout_source(self) -> Iterator[Response]:
        if self.corpus.heldout is None:
            return
        left = set(self._heldout)
        for lot in lots_of(documents_of(self.corpus.heldout)):
            documents = []
            for document in filter(None, lot):
                if document.id in left:
                    left.remove(document.id)
                    documents.append(document)
            for pieces in self.corpus.pieces(documents):
                yield from pieces

    def _require_enough(self) -> None:
        context = self.corpus.context
        prompts, train = context.recipe.prompts, context.recipe.train
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * context.launch.ranks
        if (count := self._of("pieces", "train")) < rows:
            raise LimbeckError(
                f"prompts.source={prompts.source} gives {count} pieces of up to {self._longest} tokens to train on, "
                f"and an optimizer step takes {rows}; give more text, or lower responses.max_new_tokens or "
                "train.per_device_train_batch_size"
            )
        if not self._of("pieces", "heldout"):
            raise LimbeckError(
                f"{prompts.source}: {self._of('documents', 'train')} documents at prompts.eval_fraction "
                f"{prompts.eval_fraction} leave none held out; give more documents, or change prompts.eval_fraction or "
                "prompts.split_seed, or name held-out ones with prompts.heldout"
            )
