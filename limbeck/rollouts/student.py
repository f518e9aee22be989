"""Responses that the student writes itself: for each step, for every k steps, or for each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from limbeck.rollouts.asked import ids_of, lengths_of
from limbeck.rollouts.order import Plan
from limbeck.rollouts.rounds import BatchSampler, ProcessGroup, Rounds, for_round, in_round
from limbeck.rollouts.sources import (
    MAX_PREVIEW_STEPS,
    SourceContext,
    StatelessSource,
    StepCounter,
    first_steps,
    longest_first,
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
        self._round: tuple[int, Plan, dict[int, Response]] | None = None

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
        plan, responses = self._responses(clock)
        return longest_first([responses[row] for row in plan.at(clock.step)])

    def known_step(self, clock: StepCounter) -> dict[int, Response] | None:
        known = self._round is not None and self._round[0] == clock.step // self.refresh
        return self.step(clock) if known else None

    def _responses(self, clock: StepCounter) -> tuple[Plan, dict[int, Response]]:
        """The plan and the responses, by prompt, of the round that a step belongs to."""
        number = clock.step // self.refresh
        if self._round is None or self._round[0] != number:
            start = StepCounter(step=number * self.refresh, total=clock.total)
            responses = self._write(number, start)
            plan = self.plan
            if self.whole_epochs:
                plan = replace(plan, lengths=tuple(r.length for r in responses.values()))
            self._round = (number, plan, responses)
        return self._round[1:]

    def _write(self, number: int, start: StepCounter) -> dict[int, Response]:
        if self.whole_epochs:
            rows = list(range(len(self.asked)))
        else:
            steps = range(start.step, min(start.step + self.refresh, start.total))
            rows = sorted({row for step in steps for row in self.plan.at(step)})
        sampling, context = self.rollout.at(start), self.source_context
        # Whole while others write too: the teacher's signal may hold tokens that the student chooses.
        with context.whole_student():
            if self._elsewhere is not None and not self.rollout.rounds.is_whole(number, "student"):
                self._elsewhere.take(number, context.world)
            written = self._write_rows(number, rows, sampling)
            if self._elsewhere is not None:
                self._compared = self._elsewhere.compare(number, list(written.values()), context.world)
        return written

    def _write_rows(self, number: int, rows: Sequence[int], sampling: Sampling) -> dict[int, Response]:
        asked, rollout = [self.asked[row] for row in rows], self.rollout
        if self.refresh > 1:
            written = rollout.rounds.write(
                number, "student", rollout.sampler, asked, sampling, by_teacher=rollout.by_teacher
            )
            return dict(zip(rows, written, strict=True))
        world = self.source_context.world
        mine = slice(world.rank, None, world.ranks)
        answers = rollout.sampler.respond(asked[mine], for_round(sampling, number)) if asked[mine] else []
        written = world.gather(list(zip(rows[mine], in_round(answers, number), strict=True)))
        return dict(sorted(written))
