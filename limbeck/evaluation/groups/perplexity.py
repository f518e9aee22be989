"""The group `perplexity`: how surprised student and teacher are by text, as language models are compared.

The text is the run's own held-out documents (`responses.source=text`), or that of `evaluate.groups.perplexity.source`,
such as the test set of WikiText: then of any run, and of an evaluation on its own. Each document is read in pieces as
`limbeck.prompts.documents` cuts them. Perplexities are over a model's own tokens; bits per byte compare models whose
tokens differ.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext, Who
from limbeck.evaluation.group import GroupInPieces, GroupResult, Need
from limbeck.evaluation.groups.nll import likelihood_of
from limbeck.evaluation.pieces import Piece, longest_first
from limbeck.fields import STRICT, Count
from limbeck.prompts.documents import TextSource, documents_of, first_text, pieces_of
from limbeck.prompts.readers import is_path, source_digest
from limbeck.types import Json, LimbeckError, Response, ScoredRow

_KEY = "evaluate.groups.perplexity"
# Tokens that a piece may stand behind: the beginning of sequence and the one before it.
_BEFORE = 2


@dataclass(config=STRICT, kw_only=True)
class PerplexityGroup(GroupInPieces):
    """Perplexity of student and teacher on text, and bits per byte."""

    source: str | None = None
    """Text to measure on, as for responses.source=text; null is the run's held-out documents."""
    text_field: str = "text"
    dataset_split: str = "test"
    """Part of a `datasets` source to read."""
    dataset_config: str | None = None
    max_length: Count = 512
    """Tokens of a piece of the source; those of a run's own documents are as long as it was trained on."""
    limit: Count | None = None
    """The first so many documents of the source alone."""
    teacher: bool = True
    """Measure the teacher too."""

    teacher_remedy = "set evaluate.groups.perplexity.teacher=false"

    @classmethod
    def on_responses(cls, condition: str, options: Mapping[str, object]) -> bool:
        del condition
        return options.get("source") is None

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "tokens"} if self.teacher else ())

    @property
    def scores_fresh(self) -> bool:
        return self.teacher and self.source is not None

    def check(self, evaluation: EvaluationContext) -> None:
        if self.source is None:
            if not evaluation.reads_documents:
                raise LimbeckError(
                    f"{_KEY} measures on the run's held-out documents, and there are none; name text with "
                    f"{_KEY}.source=FILE.jsonl, or train on text (responses.source=text)"
                )
            return
        most = sys.maxsize if evaluation.window is None else evaluation.window - _BEFORE
        if self.max_length > most:
            raise LimbeckError(
                f"{_KEY}.max_length is {self.max_length} and the window of the pair {evaluation.window} tokens; lower "
                f"it to {most} or less"
            )
        if is_path(self.source):
            first_text(self._text())

    def inputs(self, evaluation: EvaluationContext) -> Json:
        return {} if self.source is None else {"content": source_digest(self.source)}

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        sides: tuple[Who, ...] = ("student", "teacher") if self.teacher else ("student",)
        responses = self._responses(evaluation)
        tokens, ids = Counter[str](), dict[str, list[int]]()
        for response in responses:
            tokens[response.prompt_id] += response.tokens
            ids.setdefault(response.prompt_id, []).extend(response.response_ids)
        sizes = {name: _bytes(some, evaluation.tokenizer("student")) for name, some in ids.items()}
        nats = {who: self._nats(evaluation, who, responses) for who in sides}
        rows = []
        for name, count in tokens.items():
            sums: dict[str, tuple[float, ...]] = {}
            for who, by_document in nats.items():
                before = "" if who == "student" else "teacher_"
                sums[f"{before}perplexity"] = (by_document[name], count)
                sums[f"{before}bits_per_byte"] = (by_document[name] / math.log(2), sizes[name])
            rows.append(ScoredRow(id=name, weight=count, values={}, sums=sums))
        detail = {"text": self.source or "held-out documents", "tokens": tokens.total(), "bytes": sum(sizes.values())}
        return GroupResult(tables={"": rows}, detail=detail)

    def _nats(self, evaluation: EvaluationContext, who: Who, responses: Sequence[Response]) -> Counter[str]:
        """Sum of -log p over the tokens of each document."""
        found, batches = Counter[str](), longest_first(responses, evaluation.scoring_batch_size)
        with evaluation.meter(f"perplexity {who}", sum(r.tokens for r in responses), "tokens") as meter:
            for rows, piece in zip(batches, evaluation.pieces(self, who, len(batches)), strict=True):
                for row, nll in zip(rows, piece.tensors["nll"].tolist(), strict=True):
                    found[responses[row].prompt_id] += nll
                    meter.advance(responses[row].tokens)
        return found

    def pieces(self, evaluation: EvaluationContext, of: str, numbers: Iterable[int]) -> Iterator[Piece]:
        import torch

        responses = self._responses(evaluation)
        batches = longest_first(responses, evaluation.scoring_batch_size)
        measure = likelihood_of(evaluation) if of == "student" else self._of_teacher(evaluation)
        for number in numbers:
            found = measure(responses, batches[number])
            yield Piece(tensors={"nll": torch.tensor(found, dtype=torch.float64)})

    def _of_teacher(self, evaluation: EvaluationContext) -> Callable[[Sequence[Response], Sequence[int]], list[float]]:
        from limbeck.evaluation.likelihood import token_logp_of

        teacher = evaluation.scoring_teacher(stored=self.source is None, alone=True)

        def measure(responses: Sequence[Response], rows: Sequence[int]) -> list[float]:
            found = token_logp_of(teacher, responses, rows, device=evaluation.device)
            return [-float(logp_T.sum()) for logp_T in found]

        return measure

    def _responses(self, evaluation: EvaluationContext) -> list[Response]:
        """The text in pieces.

        Raises:
            LimbeckError: there is none.
        """
        if self.source is None:
            return list(evaluation.heldout_responses().values())
        every = documents_of(self._text())
        documents = list(islice((one for one in every if one is not None), self.limit))
        tokenizer = evaluation.tokenizer("teacher" if self.teacher else "student")
        cut = pieces_of(documents, tokenizer, longest=self.max_length, split="heldout")
        if not (responses := [piece for pieces in cut for piece in pieces]):
            raise LimbeckError(f"{_KEY}.source={self.source} holds no text in {self.text_field!r}; give another")
        return responses

    def _text(self) -> TextSource:
        assert self.source is not None, "asked for where it names text of its own"
        return TextSource(
            name=self.source,
            field=self.text_field,
            dataset_split=self.dataset_split,
            dataset_config=self.dataset_config,
            keys=_KEY,
            field_key=f"{_KEY}.text_field",
        )


def _bytes(ids: Sequence[int], tokenizer: Any) -> int:
    """Bytes of the text of some ids."""
    return len(str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)).encode())
