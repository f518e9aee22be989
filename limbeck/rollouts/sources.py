"""Response sources: they give training the responses of each optimizer step.

    OfflineSource   responses written before training, by the teacher or the data: this module
    StudentSource   the student's own responses, new for each step, for every k steps, or for each epoch: student.py
    MixedSource     a step is the student's with probability lambda, else offline (GKD, arXiv 2306.13649): mixed.py
    ReplaySource    the student's through a buffer, with a share that adapts (DistiLLM, arXiv 2402.03898): replay.py
    PairedSource    two responses per prompt, the teacher's and the student's (DistiLLM-2, arXiv 2503.07067): pairs.py

A source is asked for the responses of one step after another. What it returns is a function of the step, the weights
and its `state`, which is in the checkpoint. Recipes name sources by the registry (registry.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from limbeck.rollouts.order import Plan
from limbeck.rollouts.rounds import ProcessGroup, SingleProcess
from limbeck.types import LimbeckError, Response


@dataclass(frozen=True, kw_only=True)
class SourceContext:
    """Facts of the training that a source needs: responses per optimizer step over all ranks, seed, processes.

    Attributes:
        whole_student: entered by all ranks while the student writes; one that is sharded over them is whole inside.
    """

    step_rows: int
    seed: int
    world: ProcessGroup = field(default_factory=SingleProcess)
    whole_student: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class StepCounter:
    """Number of an optimizer step, from 0, and the number of all steps."""

    step: int
    total: int

    @property
    def progress(self) -> float:
        """Share of the training that is done before the step, in [0, 1)."""
        return self.step / self.total

    @property
    def schedule_fraction(self) -> float:
        """Position of the step in a schedule: 0 at the first step, 1 at the last."""
        return self.step / max(self.total - 1, 1)


class ResponseSource(Protocol):
    """Gives the responses of each step.

    Attributes:
        steps_per_epoch: optimizer steps in which each prompt comes once.
        prompts: ids of the prompts.
        wants_validation: whether training calls `validated` with the held-out loss, at the start and later on.
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

        The source is unchanged by it: training gets the same responses as without a preview.
        """
        ...

    def starts_round(self, clock: StepCounter) -> bool:
        """Whether responses that are kept on disk are written before this step, with the weights as they are."""
        ...

    def validated(self, loss: float) -> None:
        """Take in the held-out loss with the weights as they are."""
        ...

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        """Metrics of the source that are logged with the step."""
        ...

    def counts(self, clock: StepCounter) -> dict[str, float]:
        """Counts since the first step, this one included; see `limbeck.rollouts.account`."""
        ...

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


SourceFactory = Callable[[SourceContext], ResponseSource]


# Steps of a preview whose responses must be written for it.
MAX_PREVIEW_STEPS = 6


@runtime_checkable
class ForeseeingSource(Protocol):
    """A source that may know the responses of a step before the step before it is over.

    Sources need not be one: those of replayed answers are none, whose share a held-out loss before the step may change.
    """

    def known_step(self, clock: StepCounter) -> dict[int, Response] | None:
        """What `step` will give for the step after the last one, where that is known already; else None.

        Nothing is written or changed. Called while the student computes, in one thread at a time.
        """
        ...


def known_step_of(source: ResponseSource, clock: StepCounter) -> dict[int, Response] | None:
    """What a source will give for the step after the last one, where it knows."""
    return source.known_step(clock) if isinstance(source, ForeseeingSource) else None


def first_steps(source: ResponseSource, count: int, total: int) -> list[dict[int, Response]]:
    """The responses of the first steps, up to the end of the first epoch; the source is then as it was."""
    before = source.state()
    steps = [
        source.step(StepCounter(step=step, total=total)) for step in range(min(count, source.steps_per_epoch, total))
    ]
    source.restore(before)
    return steps


class StatelessSource:
    """Base class of sources that keep nothing between steps and need no held-out loss."""

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
    """Responses written before training.

    Args:
        rows: places in `responses` of those that are trained on; None for all. The teacher's signal of a response is
            found by its place, so give a selection by `rows` rather than a shorter list.

    Attributes:
        trained: the responses that are trained on; `plan` numbers them.
    """

    def __init__(
        self, responses: Sequence[Response], source_context: SourceContext, *, rows: Sequence[int] | None = None
    ):
        self.rows = range(len(responses)) if rows is None else rows
        self.trained = chosen = responses if rows is None else [responses[row] for row in rows]
        if not chosen:
            raise LimbeckError(
                "got no responses to train on; expected at least one, check the prompts and their lengths"
            )
        self.responses = responses
        self.plan = Plan.of(chosen, step_rows=source_context.step_rows, seed=source_context.seed)

    @property
    def prompts(self) -> frozenset[str]:
        from limbeck.rollouts.table import prompts_of

        return frozenset(prompts_of(self.trained))

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def step(self, clock: StepCounter) -> dict[int, Response]:
        return self.known_step(clock)

    def known_step(self, clock: StepCounter) -> dict[int, Response]:
        rows = [self.rows[place] for place in self.plan.at(clock.step)]
        return dict(zip(rows, numbered(self.responses, rows), strict=True))

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return first_steps(self, count, total)


def offline(responses: Sequence[Response]) -> SourceFactory:
    """Make a factory of `OfflineSource`s for responses written before training."""
    return lambda source_context: OfflineSource(responses, source_context)


def numbered(responses: Sequence[Response], numbers: Sequence[int]) -> list[Response]:
    """The responses of some numbers in a row, in that order; those on disk are read together."""
    # Arrow takes a while to import, and recipes are read without it.
    from limbeck.runtime.columns import Rows

    return responses.several(numbers) if isinstance(responses, Rows) else [responses[number] for number in numbers]


def longest_first(responses: Sequence[Response]) -> dict[int, Response]:
    """Responses numbered in the order of their lengths, longest first."""
    return dict(enumerate(sorted(responses, key=lambda r: -r.length)))


def die(seed: int, step: int) -> random.Random:
    """Random numbers of a step: a function of the seed and the step alone."""
    return random.Random(f"{seed} {step}")
