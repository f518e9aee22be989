"""A training: its steps in order, with checkpoints and metrics, and its continuation after a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from limbeck.objectives import Temperature, TemperatureSchedule
from limbeck.recipe.sections import TrainSection
from limbeck.rollouts.account import SO_FAR, count_phrase
from limbeck.rollouts.collate import padding
from limbeck.rollouts.health import health_of
from limbeck.rollouts.sources import ResponseSource, StepCounter, known_step_of
from limbeck.runtime.console import Meter
from limbeck.training import checkpoints, schedules
from limbeck.training.background import Background
from limbeck.training.best_student import EvaluationInTraining, MeasureFidelity
from limbeck.training.gradients import Following, GradientPasses
from limbeck.training.health_check import HealthCheck
from limbeck.training.loss import StepSettings, StudentLoss
from limbeck.training.metrics import Journal, LoopContext
from limbeck.training.precision import rounding_warning
from limbeck.training.progress import Progress
from limbeck.training.sharding import is_sharded
from limbeck.training.weighting import TokenWeighting
from limbeck.types import Interrupted, LimbeckError, Response

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


class NonFiniteError(LimbeckError):
    """The loss or its gradient is NaN or infinite; raised before the weights are touched."""


class FollowingWeights(Protocol):
    """Weights that follow the student's, such as their moving average."""

    def begin(self) -> None:
        """Begin as the student is now."""
        ...

    def follow(self) -> None:
        """Called after every step."""
        ...

    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The parts of a training.

    Attributes:
        step_rows: responses of an optimizer step over all ranks.
        heldout: responses whose loss the response source asks for.
        development: set-aside responses, by the teacher's number, that the student is evaluated on during training.
        average: weights that follow the student's; None where nothing does.
        total: optimizer steps.
        background: writes checkpoints and the best student beside the steps.
    """

    accelerator: Accelerator
    module: StudentLoss
    optimizer: torch.optim.Optimizer
    passes: GradientPasses
    temperature: Temperature | TemperatureSchedule
    schedule: Mapping[str, tuple[float, float]]
    weighting: TokenWeighting
    response_source: ResponseSource
    heldout: Sequence[Response]
    development: Mapping[int, Response]
    fidelity: MeasureFidelity | None
    average: FollowingWeights | None
    settings: TrainSection
    step_rows: int
    pad_id: int
    context: LoopContext
    total: int
    journal: Journal
    background: Background = field(default_factory=Background)

    @property
    def health_check(self) -> HealthCheck:
        return HealthCheck(
            accelerator=self.accelerator,
            model=self.passes.model,
            optimizer=self.optimizer,
            clip=self.passes.clip,
            chunks=partial(self.passes.chunks, ranks=1),
            pad_id=self.pad_id,
        )

    @property
    def evaluation(self) -> EvaluationInTraining:
        return EvaluationInTraining(
            responses=self.development,
            fidelity=self.fidelity,
            loss_on=lambda by_row: self.loss_on([by_row]),
            # What a policy gradient on sampled tokens estimates, whose value does not measure the fit.
            measure="reverse_kl" if self.module.loss_plan.pushes_samples else None,
            module=self.module,
            settings=self.settings,
            context=self.context,
            total=self.total,
            background=self.background,
        )

    def loss_on(self, steps: Sequence[Mapping[int, Response]]) -> float:
        """Mean loss per token on the responses of some steps, with temperature and options as in the last step."""
        at_the_end = replace(self.settings_at(Progress(step=self.total - 1)), reference=None)
        return self.passes.loss_on(steps, at_the_end)

    def warn_of_rounding(self, rated: TrainSection) -> None:
        """Warn of weights in 16 bits that cannot move; not before a first stage, so that it is said once."""
        assert isinstance(rated.learning_rate, float), "found by now"
        if self.context.label == "train" and (warning := rounding_warning(self.module.student, rated.learning_rate)):
            self.context.console.warn(warning)

    def run(self, progress: Progress, rate_of: Callable[[int], float]) -> None:
        """Do all steps that are left, with checkpoints on the way."""
        meters = self.context.console.meter(self.context.label, self.total, "steps", progress.step)
        with self.background, meters as meter:
            share = 1.0 if self.context.pause_at is None else self.context.pause_at
            # 0.1 of 30 steps is 3, though a little more than that in binary.
            pause = math.ceil(round(share * self.total, 6))
            self.evaluation.before_training(progress)
            while progress.step < self.total and not self.evaluation.stops_early(progress):
                if progress.step >= pause:
                    raise Interrupted(f"paused after step {progress.step} of {self.total}")
                self._prepare(progress)
                stop = self._step(progress, rate_of(progress.step), meter) or progress.step == pause
                due, last = progress.step % self.settings.save_steps == 0, progress.step == self.total
                if stop or due or last:
                    self._check_student(progress)
                # What is left to do with a student that is sharded, gathering and saving it, may fail too.
                if ((stop or due) and not last) or (last and is_sharded(self.module.student)):
                    self._save(progress)
                    if stop and not last:
                        self.background.finish()
                        raise Interrupted(f"stopped after step {progress.step} of {self.total}")
        if progress.step < self.total:
            self.context.console.say(
                f"{self.context.label}: ended after step {progress.step} of {self.total}: the loss on the set-aside "
                f"prompts has not fallen in {progress.since_gain} measurements (train.early_stopping_patience)"
            )

    def _prepare(self, progress: Progress) -> None:
        """Do what comes before a step: a held-out loss where it is due, a checkpoint where a round begins."""
        if (
            self.response_source.wants_validation
            and progress.step == progress.validations * self.response_source.validation_steps
        ):
            # Measured on every rank, where unlike machines may differ in the last bit: their mean is the same for all.
            measured = torch.tensor(self.health_check.heldout_loss(self.heldout), device=self.accelerator.device)
            loss: float = self.accelerator.reduce(measured, reduction="mean").item()  # type: ignore[union-attr]
            self.response_source.validated(loss)
            progress.heldout_loss = loss
            progress.validations += 1
        if progress.step and self.response_source.starts_round(self._clock(progress)):
            if progress.step > progress.saved:
                self._check_student(progress)
                self._save(progress)
            # What a round writes takes the place of what the checkpoint before it goes on with.
            self.background.finish()

    def _step(self, progress: Progress, rate: float, meter: Meter) -> bool:
        """Do one optimizer step and log its metrics; True where any rank was asked to stop."""
        started = time.perf_counter()
        self.passes.seed(progress.step)
        by_row, step_settings = self._responses(progress), self.settings_at(progress)
        written = time.perf_counter() - started
        tokens = sum(r.tokens for r in by_row.values())
        means, stop = self.gradients(by_row, step_settings, progress, following=self._following(progress))
        loss = means["loss"]
        grad_norm = self.passes.clip()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(progress, progress.step + 1, f"loss {loss}, gradient norm {grad_norm}")
        self.background.before_update()
        self.passes.update(rate)
        if self.average is not None:
            self.average.follow()
        seconds = time.perf_counter() - started
        extra = self._authored(progress, by_row, means, written)
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        metrics = {
            "step": progress.step,
            "epoch": round(progress.step / self.response_source.steps_per_epoch, 4),
            **means,
            "learning_rate": rate,
            **(
                {} if step_settings.temperature is self.temperature else {"temperature": step_settings.temperature.loss}
            ),
            **step_settings.options,
            **extra,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            **self.passes.text_tokens(progress.step),
            "seconds": round(progress.seconds, 3),
            "padding": self._padding(by_row),
        }
        due = progress.step % self.settings.logging_steps == 0 or progress.step == self.total
        if self.evaluation.due_after(progress.step):
            metrics |= self.evaluation.metrics(progress)
            due = True
        self.journal.record(metrics, by_row, due=due)
        meter.advance(1, f"step {progress.step}/{self.total}, loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
        return stop

    def gradients(
        self,
        by_row: Mapping[int, Response],
        step_settings: StepSettings,
        progress: Progress,
        *,
        following: Following | None = None,
    ) -> tuple[Mapping[str, float], bool]:
        """The gradients of a step; returns its metrics and whether any rank was asked to stop.

        Args:
            following: see `GradientPasses.gradients`.
        """
        weights = self.weighting.weights(by_row, self._clock(progress), self.response_source.steps_per_epoch)
        found = self.passes.gradients(by_row, weights, step_settings, step=progress.step, following=following)
        if self._measures_gaps(progress):
            progress.measure_gaps(found.sums)
        return found.means, found.stop

    def _following(self, progress: Progress) -> Following | None:
        """Gives the responses of the next step, where there is one and the source knows them before."""
        clock = StepCounter(step=progress.step + 1, total=self.total)
        return partial(known_step_of, self.response_source, clock) if clock.step < clock.total else None

    def _padding(self, by_row: Mapping[int, Response]) -> float:
        if self.settings.packing:
            return 0.0
        return round(padding(by_row, self.passes.chunks(by_row, ranks=self.accelerator.num_processes)), 4)

    def _authored(
        self, progress: Progress, by_row: Mapping[int, Response], means: Mapping[str, float], written: float
    ) -> dict[str, Any]:
        """Metrics of trainings in which the student writes: health of its responses, and counts by author."""
        if not self.module.loss_plan.authored:
            return {}
        clock = self._clock(progress)
        extra: dict[str, Any] = self.response_source.metrics(clock) | {"writing_seconds": round(written, 3)}
        beta = self.weighting.beta_at(clock, self.response_source.steps_per_epoch)
        if beta is not None:
            extra["beta"] = beta
        if progress.heldout_loss is not None:
            extra["heldout_loss"] = progress.heldout_loss
        progress.so_far = count_phrase(progress.so_far, by_row.values(), means) | self.response_source.counts(clock)
        so_far = {f"{SO_FAR}{name}": count for name, count in progress.so_far.items()}
        return extra | so_far | health_of(by_row.values())

    def _clock(self, progress: Progress) -> StepCounter:
        return StepCounter(step=progress.step, total=self.total)

    def settings_at(self, progress: Progress) -> StepSettings:
        """Temperature, options and reference of the step that comes next."""
        fraction = self._clock(progress).schedule_fraction
        return StepSettings(
            temperature=self.temperature.at(fraction),
            options=schedules.moved(self.schedule, fraction),
            reference=None if self._measures_gaps(progress) else progress.reference,
        )

    def _measures_gaps(self, progress: Progress) -> bool:
        """Whether the reference of an adaptive rule is still being measured."""
        rule = self.module.loss_plan.rule
        return rule is not None and progress.step < rule.warmup_epochs * self.response_source.steps_per_epoch

    def _responses(self, progress: Progress) -> dict[int, Response]:
        if progress.now[0] != progress.step:
            try:
                by_row = self.response_source.step(self._clock(progress))
            except LimbeckError:
                # A sampler sees only that numbers are not finite; the step that ruined the student is known here.
                # Of a student that is sharded all ranks would have to look, and the others write.
                if progress.now[1] and not is_sharded(self.module.student):
                    self._check_student(progress)
                raise
            progress.now = (progress.step, by_row)
        return progress.now[1]

    def _check_student(self, progress: Progress) -> None:
        """Refuse to keep or hand on a student that the last update ruined."""
        fault = self.health_check.fault(list(progress.now[1].values())[-1])
        if fault is not None:
            raise self._not_finite(progress, progress.step, fault)

    def _not_finite(self, progress: Progress, step: int, what: str) -> NonFiniteError:
        self.background.finish()
        # By the step and not by what is on disk, which another rank may still be writing.
        last = checkpoints.path_of(self.context.checkpoints, progress.saved) if progress.saved else "the start"
        remedy = "lower train.learning_rate and add --update"
        if not progress.step:
            remedy = "look for NaN or inf in the loaded weights"
        return NonFiniteError(
            f"step {step}: {what}; expected finite numbers. The last good checkpoint is {last}; "
            f"{remedy}, or use float32"
        )

    def _save(self, progress: Progress) -> None:
        state = progress.state() | {
            "step_rows": self.step_rows,
            "response_source": self.response_source.state(),
            **self.journal.state(),
        }
        checkpoints.save(
            self.context.checkpoints,
            progress.step,
            model=self.module,
            optimizer=self.optimizer.optimizer,  # type: ignore[attr-defined]
            state=state,
            average=None if self.average is None else self.average.state(),
            keep=self.settings.save_total_limit,
            background=self.background,
        )
        progress.saved = progress.step

    def resume(self) -> Progress:
        """Restore the newest checkpoint, where there is one. Later lines of metrics.jsonl are dropped."""
        newest = checkpoints.usable(self.context.checkpoints, self.context.console.warn)
        progress = Progress()
        if newest is not None:
            state = checkpoints.restore(newest, model=self.module, optimizer=self.optimizer.optimizer)  # type: ignore[attr-defined]
            if state["step_rows"] != self.step_rows:
                per_rank = self.step_rows // self.accelerator.num_processes
                raise LimbeckError(
                    f"{newest} was made with {state['step_rows']} responses per step and this launch has "
                    f"{self.step_rows}; launch {state['step_rows'] // per_rank} processes again, or delete "
                    f"{newest.parent} to train from the start"
                )
            progress = Progress.of(state)
            self.response_source.restore(state["response_source"])
            self.journal.restore(state)
        if self.average is not None:
            if newest is None:
                self.average.begin()
            else:
                self.average.restore(checkpoints.average_of(newest))
        self.journal.rewind(progress.step)
        return progress
