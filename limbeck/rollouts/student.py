"""Responses that the student writes itself: for each step, for every k steps, or for each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Protocol, runtime_checkable

import numpy as np

from limbeck.rollouts.asked import ids_of, lengths_of
from limbeck.rollouts.order import Plan
from limbeck.rollouts.round_table import in_round
from limbeck.rollouts.rounds import BatchSampler, ProcessGroup, Rounds, for_round
from limbeck.rollouts.sources import (
    MAX_PREVIEW_STEPS,
    SourceContext,
    StatelessSource,
    StepCounter,
    first_steps,
    longest_first,
    numbered,
)
from limbeck.types import LimbeckError, Response, Sampling, TokenPrompt


@runtime_checkable
class TakesWeights(Protocol):
    """A `BatchSampler` elsewhere, which writes with the student's weights once it has been given them."""

    def take(self, number: int, world: ProcessGroup) -> None:
        """Take the student's weights as they are now, for the round of a number. All ranks call."""
        ...

    def compare(self, number: int, responses: Sequence[Response], world: ProcessGroup) -> Mapping[str, float]:
        """Metrics of how far its numbers of a round are from the student's here. All ranks call."""
        ...


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Settings of the responses that are written during training, by the student or by two models together.

    Attributes:
        refresh: optimizer steps that train on one round of responses; None is an epoch.
        first_tokens: `max_new_tokens` of the first step, from where it grows linearly to that of `sampling`; None for
            no growth.
        rounds: keeps the responses of more than one step on disk.
        by_teacher: the sampler reads the teacher too.
    """

    sampler: BatchSampler
    sampling: Sampling
    rounds: Rounds
    refresh: int | None = 1
    by_teacher: bool = False
    first_tokens: int | None = None

    def at(self, clock: StepCounter) -> Sampling:
        """Sampling settings of a step, without the round's seed."""
        if self.first_tokens is None:
            return self.sampling
        end = self.sampling.max_new_tokens
        now = self.first_tokens + (end - self.first_tokens) * clock.schedule_fraction
        return replace(self.sampling, max_new_tokens=round(now))


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """The responses that some steps are trained on.

    Attributes:
        plan: of its steps.
        rows: numbers of the prompts that were asked, ascending; `responses` has their answers in the same order.
    """

    number: int
    plan: Plan
    rows: np.ndarray
    responses: Sequence[Response]

    def answers_to(self, rows: Sequence[int]) -> list[Response]:
        """The answers to prompts by their numbers."""
        return numbered(self.responses, np.searchsorted(self.rows, rows).tolist())


class StudentSource(StatelessSource):
    """The student's own responses.

    Steps of similar length are formed by the lengths of the responses where a round is whole epochs, else by those of
    the prompts, which are known beforehand. A prompt has one response per round, however often it comes in it.
    """

    def __init__(self, prompts: Sequence[TokenPrompt], rollout: RolloutConfig, source_context: SourceContext):
        if not prompts:
            raise LimbeckError("got no prompts for the student to answer; expected at least one, check their lengths")
        self.asked, self.rollout, self.source_context = prompts, rollout, source_context
        self.plan = Plan(lengths=lengths_of(prompts), step_rows=source_context.step_rows, seed=source_context.seed)
        self.refresh = rollout.refresh or self.plan.steps_per_epoch
        self.whole_epochs = self.refresh % self.plan.steps_per_epoch == 0
        self._elsewhere = rollout.sampler if isinstance(rollout.sampler, TakesWeights) else None
        self._compared: Mapping[str, float] = {}
        if self._elsewhere is not None and self.refresh == 1:
            raise LimbeckError(
                "an epoch is one step here, so that an engine would be given a whole model in every step; remove "
                "responses.engine, or set responses.source.refresh to a number of steps"
            )
        self._round: Round | None = None

    @property
    def prompts(self) -> frozenset[str]:
        return frozenset(ids_of(self.asked))

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def starts_round(self, clock: StepCounter) -> bool:
        return self.refresh > 1 and clock.step % self.refresh == 0

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        return dict(self._compared)

    def counts(self, clock: StepCounter) -> dict[str, float]:
        return {"rounds": clock.step // self.refresh + 1.0} if self.refresh > 1 else {}

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        # The first round is written with these weights in any case; a later round must be written with later weights.
        return first_steps(self, min(count, self.refresh if self.refresh > 1 else MAX_PREVIEW_STEPS), total)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        now = self.round_of(clock)
        return longest_first(now.answers_to(now.plan.at(clock.step)))

    def known_step(self, clock: StepCounter) -> dict[int, Response] | None:
        known = self._round is not None and self._round.number == clock.step // self.refresh
        return self.step(clock) if known else None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Let go of a round of one step, which is on no disk: its step may come to other weights."""
        if self.refresh == 1:
            self._round = None

    def round_of(self, clock: StepCounter) -> Round:
        """The round that a step belongs to, written if it is not there yet."""
        number = clock.step // self.refresh
        if self._round is None or self._round.number != number:
            # Rows of a table stay on disk; the round before is let go of first where they are in memory.
            self._round = None
            self._round = self._write(number, StepCounter(step=number * self.refresh, total=clock.total))
        return self._round

    def _write(self, number: int, start: StepCounter) -> Round:
        if self.whole_epochs:
            rows, asked = np.arange(len(self.asked)), self.asked
        else:
            steps = range(start.step, min(start.step + self.refresh, start.total))
            rows = np.unique(np.fromiter((row for step in steps for row in self.plan.at(step)), np.int64))
            asked = [self.asked[row] for row in rows.tolist()]
        sampling, context = self.rollout.at(start), self.source_context
        # Whole while others write too: the teacher's signal may hold tokens that the student chooses.
        with context.whole_student():
            if self._elsewhere is not None and not self.rollout.rounds.is_whole(number, "student"):
                self._elsewhere.take(number, context.world)
            written = self._write_answers(number, asked, sampling)
            if self._elsewhere is not None:
                self._compared = self._elsewhere.compare(number, written, context.world)
        plan = replace(self.plan, lengths=response_lengths(written)) if self.whole_epochs else self.plan
        return Round(number=number, plan=plan, rows=rows, responses=written)

    def _write_answers(self, number: int, asked: Sequence[TokenPrompt], sampling: Sampling) -> Sequence[Response]:
        """The answers to some prompts, in their order."""
        rollout, world = self.rollout, self.source_context.world
        if self.refresh > 1:
            return rollout.rounds.write(
                number, "student", rollout.sampler, asked, sampling, by_teacher=rollout.by_teacher
            )
        places = range(len(asked))[world.rank :: world.ranks]
        mine = [asked[place] for place in places]
        answers = rollout.sampler.respond(mine, for_round(sampling, number)) if mine else []
        written = world.gather(list(zip(places, in_round(answers, number), strict=True)))
        return [response for _, response in sorted(written, key=itemgetter(0))]


def response_lengths(responses: Sequence[Response]) -> np.ndarray:
    """`Response.length` of each."""
    # Arrow takes a while to import, and recipes are read without it.
    from limbeck.rollouts.table import lengths_of

    return lengths_of(responses)
