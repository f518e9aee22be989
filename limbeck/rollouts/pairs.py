"""Pairs of responses to each prompt, one by the teacher and one by the student (DistiLLM-2, arXiv 2503.07067)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from limbeck.rollouts.asked import with_ids
from limbeck.rollouts.order import Plan
from limbeck.rollouts.rounds import BatchSampler
from limbeck.rollouts.sources import SourceContext, StatelessSource, StepCounter, first_steps
from limbeck.rollouts.student import RolloutConfig, StudentSource
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
        self.base = {r.prompt_id: r for r in base}
        half = replace(source_context, step_rows=source_context.step_rows // 2)
        self.own = own = StudentSource(with_ids(prompts, self.base.__contains__), rollout, half)
        require_whole_epochs(own.refresh, own.steps_per_epoch)
        self.teacher, self.sampling = teacher, teacher_sampling
        self._round: tuple[int, Plan, list[tuple[Response, Response]]] | None = None

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
        plan, pairs = self._pairs(clock)
        return dict(enumerate(r for row in plan.at(clock.step) for r in pairs[row]))

    def known_step(self, clock: StepCounter) -> dict[int, Response] | None:
        known = self._round is not None and self._round[0] == clock.step // self.own.refresh
        return self.step(clock) if known else None

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
    """Check that a round of pairs is made of whole epochs.

    Raises:
        LimbeckError: it ends inside an epoch.
    """
    if refresh % steps_per_epoch:
        raise LimbeckError(
            f"responses.source.refresh is {refresh} steps and an epoch of pairs has {steps_per_epoch}: "
            "expected whole epochs, set responses.source.refresh=epoch"
        )
