"""Who writes the responses of an optimizer step, and when.

    OfflineSource   what is there before training: the teacher's answers, or the data's
    StudentSource   the student's: anew for each step, for every k steps, or for each epoch
    MixedSource     a step is the student's with probability lambda, else offline (GKD, arXiv 2306.13649)
    ReplaySource    the student's through a buffer, with a share that adapts (DistiLLM, arXiv 2402.03898): see replay.py
    PairedSource    of each prompt the teacher's and the student's (DistiLLM-2, arXiv 2503.07067)

A source is asked for the responses of one step after another. What it answers is a function of the step, the weights
and its `state`, which is in the checkpoint. Recipes name sources by the registry (registry.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from limbeck.rollouts.order import Plan
from limbeck.rollouts.rounds import BatchSampler, ProcessGroup, Rounds, SingleProcess, for_round, in_round
from limbeck.types import LimbeckError, Response, Sampling, TokenPrompt


@dataclass(frozen=True, kw_only=True)
class SourceContext:
    """What a source must know of the training: responses of an optimizer step over all ranks, seed, processes."""

    step_rows: int
    seed: int
    world: ProcessGroup = field(default_factory=SingleProcess)


@dataclass(frozen=True, kw_only=True)
class StepCounter:
    """An optimizer step, from 0, and how many there are in all."""

    step: int
    total: int

    @property
    def progress(self) -> float:
        """How much of the training is behind, in [0, 1): the last step is short of 1."""
        return self.step / self.total

    @property
    def schedule_fraction(self) -> float:
        """How far along a schedule the step is: 0 at the first, 1 at the last."""
        return self.step / max(self.total - 1, 1)


class ResponseSource(Protocol):
    """Gives the responses of each step.

    Attributes:
        steps_per_epoch: optimizer steps in which each prompt comes once.
        prompts: ids of the prompts.
        wants_validation: whether `validated` is to be told the held-out loss, at the start and as training goes on.
        validation_steps: optimizer steps from one such measurement to the next.
    """

    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def prompts(self) -> frozenset[str]: ...
    @property
    def wants_validation(self) -> bool: ...
    @property
    def validation_steps(self) -> int: ...

    def step(self, clock: StepCounter) -> dict[int, Response]:
        """The responses of the step by number, longest first; the same on all ranks.

        The numbers of fixed responses are their places in the list; the numbers of others mean nothing.
        """
        ...

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        """The responses of up to `count` first steps, at least one, by the weights as they are.

        A look that changes nothing: training then gets what it would have got without it.
        """
        ...

    def starts_round(self, clock: StepCounter) -> bool:
        """Whether responses that are kept on disk are written before this step, with the weights as they are."""
        ...

    def validated(self, loss: float) -> None: ...

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        """What is logged of the source beside its responses."""
        ...

    def counts(self, clock: StepCounter) -> dict[str, float]:
        """What it has done since the first step, this one included; see `limbeck.rollouts.account`."""
        ...

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


SourceFactory = Callable[[SourceContext], ResponseSource]

# Steps that are looked at beforehand where each costs writing its responses.
MAX_PREVIEW_STEPS = 6


def first_steps(source: ResponseSource, count: int, total: int) -> list[dict[int, Response]]:
    """The responses of the first steps, up to the end of the first epoch; the source is then as it was."""
    before = source.state()
    steps = [
        source.step(StepCounter(step=step, total=total)) for step in range(min(count, source.steps_per_epoch, total))
    ]
    source.restore(before)
    return steps


class StatelessSource:
    """A source that keeps nothing between steps and asks for nothing."""

    wants_validation = False
    validation_steps = 1

    def starts_round(self, clock: StepCounter) -> bool:
        return False

    def validated(self, loss: float) -> None:
        return

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        return {}

    def counts(self, clock: StepCounter) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        return


class OfflineSource(StatelessSource):
    """Responses that are there before training.

    Args:
        rows: places in `responses` of those that are trained on; None for all. By its place the teacher's signal of a
            response is found, so give a selection here rather than as a shorter list.
    """

    def __init__(
        self, responses: Sequence[Response], source_context: SourceContext, *, rows: Sequence[int] | None = None
    ):
        self.rows = range(len(responses)) if rows is None else rows
        chosen = [responses[row] for row in self.rows]
        if not chosen:
            raise LimbeckError(
                "got no responses to train on; expected at least one, check the prompts and their lengths"
            )
        self.responses = responses
        self.plan = Plan.of(chosen, step_rows=source_context.step_rows, seed=source_context.seed)
        self.prompts = frozenset(r.prompt_id for r in chosen)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def step(self, clock: StepCounter) -> dict[int, Response]:
        rows = [self.rows[place] for place in self.plan.at(clock.step)]
        return {row: self.responses[row] for row in rows}

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return first_steps(self, count, total)


def offline(responses: Sequence[Response]) -> SourceFactory:
    """Makes a source of responses that are all there already."""
    return lambda source_context: OfflineSource(responses, source_context)


def longest_first(responses: Sequence[Response]) -> dict[int, Response]:
    """Responses numbered in the order of their lengths."""
    return dict(enumerate(sorted(responses, key=lambda r: -r.length)))


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student, or two models together, write during training.

    Attributes:
        refresh: optimizer steps that share a round of responses; None is an epoch.
        first_tokens: `max_new_tokens` at the start, from where it grows in a line to that of `sampling`; None is there
            from the start.
        rounds: where responses that live longer than a step are kept.
        by_teacher: the teacher writes too.
    """

    sampler: BatchSampler
    sampling: Sampling
    rounds: Rounds
    refresh: int | None = 1
    by_teacher: bool = False
    first_tokens: int | None = None

    def at(self, clock: StepCounter) -> Sampling:
        """The sampling settings of a step, without the round's random numbers."""
        if self.first_tokens is None:
            return self.sampling
        end = self.sampling.max_new_tokens
        now = self.first_tokens + (end - self.first_tokens) * clock.schedule_fraction
        return replace(self.sampling, max_new_tokens=round(now))


class StudentSource(StatelessSource):
    """What the student writes itself.

    A round of whole epochs is cut into steps by the lengths of its responses, any other by those of its prompts, which
    are known beforehand. A prompt has one response a round, however often it comes in it.
    """

    def __init__(self, prompts: Sequence[TokenPrompt], rollout: RolloutConfig, source_context: SourceContext):
        if not prompts:
            raise LimbeckError("got no prompts for the student to answer; expected at least one, check their lengths")
        self.asked, self.rollout, self.source_context = prompts, rollout, source_context
        self.plan = Plan(
            lengths=tuple(len(p.ids) for p in prompts), step_rows=source_context.step_rows, seed=source_context.seed
        )
        self.prompts = frozenset(p.id for p in prompts)
        self.refresh = rollout.refresh or self.plan.steps_per_epoch
        self.whole_epochs = self.refresh % self.plan.steps_per_epoch == 0
        self._round: tuple[int, Plan, dict[int, Response]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def starts_round(self, clock: StepCounter) -> bool:
        return self.refresh > 1 and clock.step % self.refresh == 0

    def counts(self, clock: StepCounter) -> dict[str, float]:
        return {"rounds": clock.step // self.refresh + 1.0} if self.refresh > 1 else {}

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        # The first round is written with these weights in any case; a later one would be kept and be the wrong one.
        return first_steps(self, min(count, self.refresh if self.refresh > 1 else MAX_PREVIEW_STEPS), total)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        plan, responses = self._responses(clock)
        return longest_first([responses[row] for row in plan.at(clock.step)])

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
        asked, sampling, rollout = [self.asked[row] for row in rows], self.rollout.at(start), self.rollout
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


class MixedSource(StatelessSource):
    """Whole steps of the student's with probability lambda, else of what is fixed; all ranks throw the same die.

    Lambda moves in a line. ImitKD (arXiv 2010.07859) lets the fixed share fall exponentially; what others call ImitKD
    is the student's own responses alone, through a buffer.
    """

    def __init__(self, own: StudentSource, base: OfflineSource, *, share: tuple[float, float], seed: int):
        for value in share:
            if not 0 <= value <= 1:
                raise LimbeckError(f"share is {value}: expected a probability from 0 (fixed) to 1 (the student's own)")
        self.own, self.base, self.share, self.seed = own, base, share, seed
        self.prompts = own.prompts | base.prompts

    @property
    def steps_per_epoch(self) -> int:
        return self.base.steps_per_epoch

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        if self.own.refresh > 1:
            # Its first round may be written later than at the first step.
            return self.base.preview(count, total)
        return first_steps(self, min(count, MAX_PREVIEW_STEPS), total)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        chosen = self.own if die(self.seed, clock.step).random() < self._share(clock) else self.base
        return chosen.step(clock)

    def _share(self, clock: StepCounter) -> float:
        start, end = self.share
        return start + (end - start) * clock.schedule_fraction

    def starts_round(self, clock: StepCounter) -> bool:
        return self.own.starts_round(clock)

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        return {"share": self._share(clock)}


class PairedSource(StatelessSource):
    """Of each prompt two responses in the same step, the teacher's and then the student's.

    Attributes:
        teacher: writes the teacher's anew from the second round on; None keeps those that were there before training.
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
        self.base = {r.prompt_id: r for r in base}
        half = replace(source_context, step_rows=source_context.step_rows // 2)
        self.own = own = StudentSource([p for p in prompts if p.id in self.base], rollout, half)
        require_whole_epochs(own.refresh, own.steps_per_epoch)
        self.teacher, self.sampling = teacher, teacher_sampling
        self.prompts = own.prompts
        self._round: tuple[int, Plan, list[tuple[Response, Response]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.own.steps_per_epoch

    def starts_round(self, clock: StepCounter) -> bool:
        return self.own.starts_round(clock)

    def counts(self, clock: StepCounter) -> dict[str, float]:
        return self.own.counts(clock)

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return first_steps(self, count, total)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        plan, pairs = self._pairs(clock)
        return dict(enumerate(r for row in plan.at(clock.step) for r in pairs[row]))

    def _pairs(self, clock: StepCounter) -> tuple[Plan, list[tuple[Response, Response]]]:
        number = clock.step // self.own.refresh
        if self._round is None or self._round[0] != number:
            theirs = self._teachers(number)
            _, written = self.own._responses(clock)
            pairs = [(theirs[r.prompt_id], r) for r in written.values()]
            lengths = tuple(max(t.length, s.length) for t, s in pairs)
            plan = replace(self.own.plan, lengths=lengths)
            self._round = (number, plan, pairs)
        return self._round[1:]

    def _teachers(self, number: int) -> dict[str, Response]:
        if self.teacher is None or number == 0:
            return self.base
        assert self.sampling is not None
        asked, rounds = self.own.asked, self.own.rollout.rounds
        written = rounds.write(number, "teacher", self.teacher, asked, self.sampling, by_teacher=True)
        return {r.prompt_id: r for r in written}


def require_whole_epochs(refresh: int, steps_per_epoch: int) -> None:
    """Refuse a round of pairs that ends inside an epoch.

    Raises:
        LimbeckError: it does.
    """
    if refresh % steps_per_epoch:
        raise LimbeckError(
            f"responses.source.refresh is {refresh} steps and an epoch of pairs has {steps_per_epoch}: "
            "expected whole epochs, set responses.source.refresh=epoch"
        )


def die(seed: int, step: int) -> random.Random:
    """The random numbers of a step: functions of the seed and its number alone."""
    return random.Random(f"{seed} {step}")
