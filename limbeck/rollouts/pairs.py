"""Pairs of responses to each prompt, one by the teacher and one by the student (DistiLLM-2, arXiv 2503.07067)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from limbeck.rollouts.asked import ids_of, with_ids
from limbeck.rollouts.order import Plan
from limbeck.rollouts.rounds import BatchSampler
from limbeck.rollouts.sources import SourceContext, StatelessSource, StepCounter, first_steps, numbered
from limbeck.rollouts.student import RolloutConfig, StudentSource, response_lengths
from limbeck.types import LimbeckError, Response, Sampling, TokenPrompt


class PairedSource(StatelessSource):
    """Two responses to each prompt of a step, first the teacher's, then the student's.

    Attributes:
        teacher: samples new teacher responses from the second round on; None keeps those written before training.
    """

    def __init__(
        self,
        base: Sequence[Response],
        prompts: Sequence[TokenPrompt],
        rollout: RolloutConfig,
        source_context: SourceContext,
        *,
        teacher: BatchSampler | None = None,
        teacher_sampling: Sampling | None = None,
    ):
        if source_context.step_rows % 2:
            raise LimbeckError(
                f"a step of {source_context.step_rows} responses cannot be made of pairs: "
                "give train.per_device_train_batch_size an even number"
            )
        # Arrow takes a while to import, and recipes are read without it.
        from limbeck.rollouts.table import prompts_of

        places = {name: place for place, name in enumerate(prompts_of(base))}
        half = replace(source_context, step_rows=source_context.step_rows // 2)
        self.own = own = StudentSource(with_ids(prompts, places.__contains__), rollout, half)
        require_whole_epochs(own.refresh, own.steps_per_epoch)
        asked = ids_of(own.asked)
        self.base, self._base_places = base, np.fromiter((places[name] for name in asked), np.int64, len(own.asked))
        self.teacher, self.sampling = teacher, teacher_sampling
        self._pairs: _Pairs | None = None

    @property
    def prompts(self) -> frozenset[str]:
        return self.own.prompts

    @property
    def steps_per_epoch(self) -> int:
        return self.own.steps_per_epoch

    def starts_round(self, clock: StepCounter) -> bool:
        return self.own.starts_round(clock)

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        return self.own.metrics(clock)

    def counts(self, clock: StepCounter) -> dict[str, float]:
        return self.own.counts(clock)

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return first_steps(self, count, total)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        pairs = self._pairs_of(clock)
        return dict(enumerate(chain.from_iterable(pairs.of(pairs.plan.at(clock.step)))))

    def known_step(self, clock: StepCounter) -> dict[int, Response] | None:
        known = self._pairs is not None and self._pairs.number == clock.step // self.own.refresh
        return self.step(clock) if known else None

    def _pairs_of(self, clock: StepCounter) -> _Pairs:
        """The pairs of the round that a step belongs to."""
        number = clock.step // self.own.refresh
        if self._pairs is None or self._pairs.number != number:
            theirs, places = self._teachers(number)
            own = self.own.round_of(clock).responses
            lengths = np.maximum(response_lengths(theirs)[places], response_lengths(own))
            plan = replace(self.own.plan, lengths=lengths)
            self._pairs = _Pairs(number=number, plan=plan, theirs=theirs, places=places, own=own)
        return self._pairs

    def _teachers(self, number: int) -> tuple[Sequence[Response], np.ndarray]:
        """Responses of the teacher, and for each prompt that is asked the place of its own."""
        if self.teacher is None or number == 0:
            return self.base, self._base_places
        assert self.sampling is not None
        asked, rounds = self.own.asked, self.own.rollout.rounds
        written = rounds.write(number, "teacher", self.teacher, asked, self.sampling, by_teacher=True)
        return written, np.arange(len(asked))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pairs:
    """The pairs of a round, one for each prompt that is asked.

    Attributes:
        places: where the teacher's response to each prompt stands in `theirs`.
    """

    number: int
    plan: Plan
    theirs: Sequence[Response]
    places: np.ndarray
    own: Sequence[Response]

    def of(self, rows: Sequence[int]) -> Iterator[tuple[Response, Response]]:
        """The teacher's response to each of some prompts, and the student's."""
        theirs = numbered(self.theirs, self.places[list(rows)].tolist())
        return zip(theirs, numbered(self.own, rows), strict=True)


def require_whole_epochs(refresh: int, steps_per_epoch: int) -> None:
    """Check that a round of pairs is made of whole epochs.

    Raises:
        LimbeckError: it ends inside an epoch.
    """
    if refresh % steps_per_epoch:
        raise LimbeckError(
            f"responses.source.refresh is {refresh} steps and an epoch of pairs has {steps_per_epoch}: "
            "expected whole epochs, set responses.source.refresh=epoch"
        )
