"""Answers that come one by one, from servers, as the batches that a training keeps on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from limbeck.sampling.local import SampledBatch, in_order
from limbeck.sampling.served import Served
from limbeck.types import Response, Sampling, TokenPrompt


class AnswersAsTheyCome(Protocol):
    """Gives each answer when it is there (`ServedSampler`, `EngineSampler`)."""

    def respond_as_they_come(
        self, prompts: Sequence[TokenPrompt], sampling: Sampling, *, done: Collection[int] = ()
    ) -> Iterator[Served]: ...


@dataclass(frozen=True, kw_only=True)
class InBatches:
    """A sampler that yields its batches as they end (`limbeck.rollouts.rounds.BatchSampler`).

    The prompts of all batches are asked at once, in order, so that servers are never idle between two batches.

    Attributes:
        batch_size: answers that are kept together.
    """

    answers: AnswersAsTheyCome
    batch_size: int

    def respond(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        """Answer every prompt, in the order given."""
        return in_order(self.respond_in_batches(prompts, sampling), len(prompts))

    def plan(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[tuple[int, ...]]:
        """The batches, as indices into the list of prompts, in its order."""
        rows = range(len(prompts))
        return [tuple(rows[start : start + self.batch_size]) for start in rows[:: self.batch_size]]

    def respond_in_batches(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: Sampling,
        *,
        done: Collection[int] = (),
        capture_hidden: bool = False,
    ) -> Iterator[SampledBatch]:
        """Answer the prompts; each batch is handed over when all of it is there.

        Args:
            done: indices of prompts answered before; a batch is skipped when all of its indices are among them.
            capture_hidden: is not done: a server keeps its hidden states.
        """
        skipped = set(done)
        left = [batch for batch in self.plan(prompts, sampling) if not set(batch) <= skipped]
        batch_of = {row: batch for batch in left for row in batch}
        found: dict[int, Response] = {}
        answered = [row for row in range(len(prompts)) if row not in batch_of]
        for served in self.answers.respond_as_they_come(prompts, sampling, done=answered):
            found[served.index] = served.response
            batch = batch_of[served.index]
            if all(row in found for row in batch):
                yield SampledBatch(indices=batch, responses=tuple(found.pop(row) for row in batch), hidden=None)
