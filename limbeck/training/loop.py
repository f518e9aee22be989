"""The training loop: one optimizer step after another, on accelerate.

A step is: its responses, from whoever writes them, cut into micro-batches; each micro-batch's teacher signal and
student hidden states; the objective's per-token values, weighted so that they add up to a mean over the whole step, all
ranks and accumulation steps; backward; clip; update. The order of the data, the learning rate, who writes and the
weights are functions of the step number and of what is in the checkpoint, so a run that continues from one is the run
that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from limbeck.models.heads import head_of
from limbeck.objectives import Temperature, TemperatureSchedule
from limbeck.ops import onednn
from limbeck.recipe.sections import TrainSection
from limbeck.rollouts.account import SO_FAR, count_phrase
from limbeck.rollouts.collate import collate, micro_batches, padding
from limbeck.rollouts.health import health_of
from limbeck.rollouts.sources import ResponseSource, SourceContext, SourceFactory, StepCounter
from limbeck.runtime.console import Meter
from limbeck.training import checkpoints, launch, learning_rate, schedules
from limbeck.training.corpus import Corpus
from limbeck.training.health_check import HealthCheck
from limbeck.training.loss import LossPlan, StepSettings, StudentLoss, make_projection
from limbeck.training.metrics import Journal, LoopContext
from limbeck.training.percentile import StreamingPercentile
from limbeck.training.precision import rounding_warning
from limbeck.training.progress import Best, Progress
from limbeck.training.rate_trials import RateTrials, previews_wanted
from limbeck.training.weighting import TokenWeighting
from limbeck.training.whitening import whitened
from limbeck.types import Interrupted, LimbeckError, Response, Signal, SignalSource, TokenBatch

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteError(LimbeckError):
    """The loss or its gradient is NaN or infinite; raised before the weights are touched."""


MeasureFidelity = Callable[[nn.Module], Mapping[str, float]]


def train(
    student: nn.Module,
    author: SourceFactory,
    teacher: SignalSource,
    loss_plan: LossPlan,
    *,
    temperature: Temperature | TemperatureSchedule,
    schedule: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    weighting: TokenWeighting | None = None,
    heldout: Sequence[Response] = (),
    development: Mapping[int, Response] = MappingProxyType({}),
    fidelity: MeasureFidelity | None = None,
    corpus: Corpus | None = None,
    settings: TrainSection,
    vocab_size: int,
    pad_id: int,
    context: LoopContext,
) -> nn.Module:
    """Train the student in place and return it; continues from the newest checkpoint where there is one.

    Args:
        author: who writes the responses of each step; the rows of `teacher` signals are their numbers.
        loss_plan: the objective of each author's responses.
        schedule: options of the objective that move in a line from one value to another over the training.
        weighting: weights of the teacher's and the student's responses against each other; None treats all alike.
        heldout: responses whose loss is measured where the author asks for it.
        development: responses, by the teacher's number, whose loss is measured every `settings.eval_steps`; the student
            of the lowest is returned where the settings say so.
        fidelity: gives further metrics of the student on those, by name; logged beside their loss.
        corpus: text whose cross-entropy is added to the loss of every step.
        vocab_size: real token ids of the pair.

    Raises:
        NonFiniteError: NaN or inf in a loss or gradient, naming the step.
        Interrupted: `context` said so; a checkpoint of the finished step is on disk.
        LimbeckError: nothing is held out for an author that asks for its loss, or pairs would be cut apart.
    """
    run = _prepared(
        student,
        author,
        teacher,
        loss_plan,
        temperature=temperature,
        schedule=schedule,
        weighting=weighting,
        heldout=heldout,
        development=development,
        fidelity=fidelity,
        corpus=corpus,
        settings=settings,
        vocab_size=vocab_size,
        pad_id=pad_id,
        context=context,
    )
    progress = run.resume()
    try:
        rated = run.with_learning_rate(progress)
        run.warn_of_rounding(rated)
        run.play(progress, schedules.learning_rate(rated, run.total))
        run.hand_on_best(progress)
    finally:
        # Not accelerate's end_training: that would also end the process group, which is the launcher's.
        for tracker in run.accelerator.trackers:
            tracker.finish()
    student.eval()
    return student


def find_learning_rate(
    student: nn.Module,
    author: SourceFactory,
    teacher: SignalSource,
    loss_plan: LossPlan,
    *,
    temperature: Temperature | TemperatureSchedule,
    schedule: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    settings: TrainSection,
    vocab_size: int,
    pad_id: int,
    context: LoopContext,
) -> None:
    """Search the learning rate of a training that comes later, and keep it at `context.learning_rate`.

    A first stage leaves the student where any larger step does harm at first, though it pays later; so the training
    that follows is tried on the student as it was before. The student is left as it is.
    """
    run = _prepared(
        student,
        author,
        teacher,
        loss_plan,
        temperature=temperature,
        schedule=schedule,
        settings=replace(settings, report_to=()),
        vocab_size=vocab_size,
        pad_id=pad_id,
        context=context,
    )
    run.search()
    student.eval()


def _prepared(
    student: nn.Module,
    author: SourceFactory,
    teacher: SignalSource,
    loss_plan: LossPlan,
    *,
    temperature: Temperature | TemperatureSchedule,
    schedule: Mapping[str, tuple[float, float]],
    weighting: TokenWeighting | None = None,
    heldout: Sequence[Response] = (),
    development: Mapping[int, Response] = MappingProxyType({}),
    fidelity: MeasureFidelity | None = None,
    corpus: Corpus | None = None,
    settings: TrainSection,
    vocab_size: int,
    pad_id: int,
    context: LoopContext,
) -> _Run:
    """The parts of a loop, ready to run; see `train`."""
    accelerator = launch.accelerator(
        settings, context.checkpoints.parent, run_name=context.run_name, tracker_config=context.tracker_config
    )
    step_rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    response_source = author(SourceContext(step_rows=step_rows, seed=settings.seed, world=launch.Ranks(accelerator)))
    if response_source.wants_validation and not heldout:
        raise LimbeckError("the author asks for the held-out loss and got no held-out responses; expected at least one")
    if loss_plan.rule is not None and loss_plan.rule.pairs and settings.per_device_train_batch_size % 2:
        raise LimbeckError(
            f"train.per_device_train_batch_size is {settings.per_device_train_batch_size} and the rule "
            f"{loss_plan.rule.name} compares pairs side by side; expected an even number"
        )
    total = schedules.total_steps(settings, response_source.steps_per_epoch)
    student.train()
    projection_ED = None
    if any("hidden" in objective.reads for objective in loss_plan.objectives):
        row, response = next(iter(response_source.preview(1, total)[0].items()))
        one = collate({row: response}, (row,), pad_id=pad_id)
        projection_ED = make_projection(student, teacher, one, vocab_size=vocab_size, seed=settings.seed)
    loss_module = StudentLoss(
        student, loss_plan, vocab_size=vocab_size, projection_ED=projection_ED, compile=settings.compile
    )
    optimizer = launch.adamw(loss_module, settings)
    model, optimizer = accelerator.prepare(loss_module, optimizer)
    return _Run(
        accelerator=accelerator,
        model=model,
        module=loss_module,
        optimizer=optimizer,
        temperature=temperature,
        schedule=schedule,
        weighting=weighting or TokenWeighting(reduction=settings.reduction),
        response_source=response_source,
        heldout=heldout,
        development=development,
        fidelity=fidelity,
        corpus=corpus,
        teacher=teacher,
        settings=settings,
        step_rows=step_rows,
        pad_id=pad_id,
        context=context,
        total=total,
        journal=Journal(
            accelerator=accelerator, context=context, authored=loss_plan.authored, prompts=response_source.prompts
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a running loop."""

    accelerator: Accelerator
    model: nn.Module
    module: StudentLoss
    optimizer: torch.optim.Optimizer
    temperature: Temperature | TemperatureSchedule
    schedule: Mapping[str, tuple[float, float]]
    weighting: TokenWeighting
    response_source: ResponseSource
    heldout: Sequence[Response]
    development: Mapping[int, Response]
    fidelity: MeasureFidelity | None
    corpus: Corpus | None
    teacher: SignalSource
    settings: TrainSection
    step_rows: int
    pad_id: int
    context: LoopContext
    total: int
    journal: Journal

    @property
    def probe(self) -> HealthCheck:
        return HealthCheck(
            accelerator=self.accelerator,
            model=self.model,
            optimizer=self.optimizer,
            clip=self._clip,
            rows=self.settings.per_device_train_batch_size,
            pad_id=self.pad_id,
        )

    def with_learning_rate(self, progress: Progress) -> TrainSection:
        """The settings with a learning rate: the recipe's own, or the one that a search finds."""
        if self.settings.learning_rate != "auto":
            return self.settings
        if progress.learning_rate is None:
            progress.learning_rate = self.search()
            self.context.console.say(f"{self.context.label}: learning rate {progress.learning_rate:.3g}, by a search")
        return replace(self.settings, learning_rate=progress.learning_rate)

    def warn_of_rounding(self, rated: TrainSection) -> None:
        """Say of weights in 16 bits how many cannot move; once, not for a first stage too."""
        assert isinstance(rated.learning_rate, float), "found by now"
        if self.context.label == "train" and (warning := rounding_warning(self.module.student, rated.learning_rate)):
            self.context.console.warn(warning)

    def search(self) -> float:
        """The learning rate that the student as it stands learns best with."""
        inner = self.module.student
        found = learning_rate.search(
            self.context.learning_rate,
            metric=self.module.loss_plan.gauge,
            guess=learning_rate.first_guess(
                head_of(inner, self.module.vocab_size, verify=False).weight_VD.shape[1],
                adapters=any("lora_" in name for name, _ in inner.named_parameters()),
            ),
            trials=self._trials,
            accelerator=self.accelerator,
            say=lambda line: self.context.console.say(f"{self.context.label}: {line}"),
        )
        assert found.chosen is not None, "a search ends with a choice"
        return found.chosen

    def _trials(self) -> RateTrials:
        return RateTrials.of(
            self.response_source.preview(previews_wanted(self.step_rows), self.total),
            module=self.module,
            optimizer=self.optimizer.optimizer,  # type: ignore[attr-defined]
            update=self._trial_update,
            loss_on=self.loss_on,
        )

    def _trial_update(self, step: int, by_row: Mapping[int, Response], rate: float) -> bool:
        """One update with the gradients of some responses, of which nothing is logged."""
        self._seed(step)
        progress = Progress(step=step)
        means, stop = self._gradients(by_row, self._moment(progress), progress)
        finite = math.isfinite(means["loss"]) and math.isfinite(self._clip())
        if finite:
            self._update(rate)
        if stop:
            raise Interrupted("stopped while the learning rate was searched")
        return finite

    def _update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def loss_on(self, steps: Sequence[Mapping[int, Response]]) -> float:
        """Mean per token of `Judgement.gauge` on the responses of some steps, over all ranks, with what moves over
        training as it stands at the end."""
        moment = replace(self._moment(Progress(step=self.total - 1)), reference=None)
        sums = torch.zeros(2, device=self.accelerator.device)
        place = self.module.stats.index(self.module.loss_plan.gauge)
        self.model.eval()
        for by_row in steps:
            for micro in self._micro_batches(by_row):
                batch, signal = self._batch(micro, by_row)
                with onednn.linears():
                    part = self.model(batch, signal, torch.ones_like(batch.labels_N).float(), moment)[1][place]
                if micro:
                    sums += part
        self.model.train()
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()  # type: ignore[union-attr]
        return total / max(count, 1.0)

    def evaluate(self, progress: Progress) -> float:
        """The loss on the set-aside responses; the weights of the lowest so far are kept."""
        loss = self.loss_on([self.development])
        least = math.inf if progress.best is None else progress.best.loss - self.settings.early_stopping_threshold
        # NaN is no gain.
        progress.since_gain = 0 if loss < least else progress.since_gain + 1
        if math.isfinite(loss) and (progress.best is None or loss < progress.best.loss):
            progress.best = Best(step=progress.step, loss=loss)
            checkpoints.save_best(self.context.checkpoints, progress.step, self.module)
        return loss

    def _fidelity(self) -> dict[str, float]:
        """Fidelity of the student on the set-aside responses, as metrics that begin with eval_."""
        if self.fidelity is None:
            return {}
        self.module.student.eval()
        found = self.fidelity(self.module.student)
        self.module.student.train()
        return {f"eval_{name}": value for name, value in found.items()}

    def _gave_up(self, progress: Progress) -> bool:
        """Whether the loss on the set-aside responses has not fallen for as long as the settings have patience."""
        patience = self.settings.early_stopping_patience
        return patience is not None and progress.since_gain >= patience

    def _evaluates_after(self, step: int) -> bool:
        every = self.settings.eval_steps or self.total
        return bool(self.development) and (step % every == 0 or step == self.total)

    def hand_on_best(self, progress: Progress) -> None:
        """Take the weights of the lowest loss on the set-aside responses, where they are not the last ones."""
        best = progress.best
        if best is None or not self.settings.load_best_model_at_end or best.step == progress.step:
            return
        checkpoints.restore_best(self.context.checkpoints, best.step, self.module)
        where = f"after step {best.step}" if best.step else "before training"
        self.context.console.warn(
            f"{self.context.label}: the loss on the set-aside prompts was lowest {where} ({best.loss:.4g}): that "
            f"student is handed on, not the one of step {progress.step}; "
            "lower train.learning_rate, train for fewer steps, or set train.load_best_model_at_end=false"
        )

    def play(self, progress: Progress, rate_of: Callable[[int], float]) -> None:
        """All steps that are left, with checkpoints on the way."""
        with self.context.console.meter(self.context.label, self.total, "steps", progress.step) as meter:
            share = 1.0 if self.context.pause_at is None else self.context.pause_at
            # 0.1 of 30 steps is 3, though a little more than that in binary.
            pause = math.ceil(round(share * self.total, 6))
            if self.development and progress.step == 0:
                progress.first_loss = self.evaluate(progress)
            while progress.step < self.total and not self._gave_up(progress):
                if progress.step >= pause:
                    raise Interrupted(f"paused after step {progress.step} of {self.total}")
                self._prepare(progress)
                stop = self.step(progress, rate_of(progress.step), meter) or progress.step == pause
                due, last = progress.step % self.settings.save_steps == 0, progress.step == self.total
                if stop or due or last:
                    self._check_student(progress)
                if (stop or due) and not last:
                    self.save(progress)
                    if stop:
                        raise Interrupted(f"stopped after step {progress.step} of {self.total}")
        if progress.step < self.total:
            self.context.console.say(
                f"{self.context.label}: ended after step {progress.step} of {self.total}: the loss on the set-aside "
                f"prompts has not fallen in {progress.since_gain} measurements (train.early_stopping_patience)"
            )

    def _prepare(self, progress: Progress) -> None:
        """What comes before a step: a held-out loss where it is due, a checkpoint where a round begins."""
        if (
            self.response_source.wants_validation
            and progress.step == progress.validations * self.response_source.validation_steps
        ):
            # Measured on every rank, where unlike machines may differ in the last bit: their mean is the same for all.
            measured = torch.tensor(self.probe.heldout_loss(self.heldout), device=self.accelerator.device)
            loss: float = self.accelerator.reduce(measured, reduction="mean").item()  # type: ignore[union-attr]
            self.response_source.validated(loss)
            progress.heldout_loss = loss
            progress.validations += 1
        if progress.step > progress.saved and self.response_source.starts_round(self._clock(progress)):
            self._check_student(progress)
            self.save(progress)

    def step(self, progress: Progress, rate: float, meter: Meter) -> bool:
        """One optimizer step and its metrics; advances `progress` and says whether any rank was asked to stop."""
        started = time.perf_counter()
        self._seed(progress.step)
        by_row, moment = self._responses(progress), self._moment(progress)
        written = time.perf_counter() - started
        tokens = sum(r.tokens for r in by_row.values())
        means, stop = self._gradients(by_row, moment, progress)
        loss = means["loss"]
        grad_norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(
                progress.step + 1, f"loss {loss}, gradient norm {grad_norm}", begun=progress.step > 0
            )
        self._update(rate)
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
            **({} if moment.temperature is self.temperature else {"temperature": moment.temperature.loss}),
            **moment.options,
            **extra,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            **self._text_tokens(progress),
            "seconds": round(progress.seconds, 3),
            "padding": round(padding(by_row, self.settings.per_device_train_batch_size), 4),
        }
        due = progress.step % self.settings.logging_steps == 0 or progress.step == self.total
        if self._evaluates_after(progress.step):
            loss_aside = self.evaluate(progress)
            metrics |= {"eval_loss": loss_aside, "eval_loss_before": progress.first_loss}
            if math.isfinite(loss_aside):
                metrics |= self._fidelity()
            due = True
        self.journal.record(metrics, by_row, due=due)
        meter.advance(1, f"step {progress.step}/{self.total}, loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
        return stop

    def _authored(
        self, progress: Progress, by_row: Mapping[int, Response], means: Mapping[str, float], written: float
    ) -> dict[str, Any]:
        """What is logged where the student writes: the health of its responses, and who wrote how much."""
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

    def _moment(self, progress: Progress) -> StepSettings:
        way = self._clock(progress).schedule_fraction
        return StepSettings(
            temperature=self.temperature.at(way),
            options=schedules.moved(self.schedule, way),
            reference=None if self._measures_gaps(progress) else progress.reference,
        )

    def _measures_gaps(self, progress: Progress) -> bool:
        """Whether the reference of an adaptive rule is still being measured."""
        rule = self.module.loss_plan.rule
        return rule is not None and progress.step < rule.warmup_epochs * self.response_source.steps_per_epoch

    def _gradients(
        self, by_row: Mapping[int, Response], moment: StepSettings, progress: Progress
    ) -> tuple[dict[str, float], bool]:
        """The gradients of the step; means of what is logged and whether a rank was asked to stop, over all ranks."""
        sums = torch.zeros(len(self.module.stats), 2, device=self.accelerator.device)
        ranks = self.accelerator.num_processes
        micros = self._micro_batches(by_row)
        weights = self.weighting.weights(by_row, self._clock(progress), self.response_source.steps_per_epoch)
        # DDP averages over ranks, the step sums over them: hence the factor.
        weights = {row: ranks * weight for row, weight in weights.items()}
        tail = None
        if self.module.loss_plan.authored:
            tail = StreamingPercentile(sum(r.tokens for r in by_row.values()), device=self.accelerator.device)
        seen: dict[int, tuple[TokenBatch, Signal]] = {}
        if self.module.loss_plan.rule is not None and self.module.loss_plan.rule.whiten:
            seen = {i: self._batch(micro, by_row) for i, micro in enumerate(micros)}
            looks = [(*seen[i], bool(micro)) for i, micro in enumerate(micros)]
            moment = whitened(moment, looks, accelerator=self.accelerator, model=self.model)
        text = self._text_gradients(progress.step)
        for i, micro in enumerate(micros):
            batch, signal = seen.get(i) or self._batch(micro, by_row)
            weight_B = [weights[row] if micro else 0.0 for row in batch.rows]
            part, value_N = self._backward(batch, signal, weight_B, moment, last=i == len(micros) - 1)
            if not micro:
                continue
            sums += part
            if tail is not None:
                tail.add(value_N)
        # Ranks must agree to stop at the same step, so the wish travels with the loss.
        wish = torch.tensor([float(self.context.should_stop())], device=sums.device)
        every = torch.cat([sums.flatten(), text, wish])
        *summed, text_sum, text_count, stop = self.accelerator.reduce(every, reduction="sum").tolist()  # type: ignore[union-attr]
        found = {
            name: (total, count)
            for name, total, count in zip(self.module.stats, summed[::2], summed[1::2], strict=True)
            if count
        }
        if self._measures_gaps(progress):
            progress.measure_gaps(found)
        means = {name: total / count for name, (total, count) in found.items()}
        if text_count:
            means["loss/lm"] = text_sum / text_count
        if tail is not None:
            means["kl_p99"] = tail.value(self.accelerator.gather).item()  # type: ignore[arg-type]
        return means, stop > 0

    def _text_tokens(self, progress: Progress) -> dict[str, int]:
        """Tokens of the second corpus so far, which are not among the others."""
        if self.corpus is None:
            return {}
        ranks, accumulation = self.accelerator.num_processes, self.settings.gradient_accumulation_steps
        return {"lm_tokens": progress.step * self.corpus.tokens(accumulation=accumulation, ranks=ranks)}

    def _text_gradients(self, step: int) -> Tensor:
        """The gradients of the language-modelling loss; sum and count of its tokens on this rank."""
        found = torch.zeros(2, device=self.accelerator.device)
        if self.corpus is None:
            return found
        for batch, weight_B in self.corpus.batches(
            step,
            accumulation=self.settings.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            pad_id=self.pad_id,
        ):
            # The last backward of a step, in which ranks meet, is one of the responses.
            batch = batch.to(self.accelerator.device)
            _, value_N = self._backward(batch, None, weight_B, StepSettings(), last=False)
            found += torch.stack([value_N.float().sum(), found.new_tensor(float(len(value_N)))])
        return found

    def _micro_batches(self, by_row: Mapping[int, Response]) -> list[tuple[int, ...]]:
        return micro_batches(
            tuple(by_row),
            rows_per_device=self.settings.per_device_train_batch_size,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )

    def _check_student(self, progress: Progress) -> None:
        """A student whose last update ruined it is neither kept nor handed on."""
        fault = self.probe.fault(list(progress.now[1].values())[-1])
        if fault is not None:
            raise self._not_finite(progress.step, fault, begun=True)

    def _not_finite(self, step: int, what: str, *, begun: bool) -> NonFiniteError:
        last = checkpoints.newest(self.context.checkpoints)
        remedy = "lower train.learning_rate and add --update" if begun else "look for NaN or inf in the loaded weights"
        return NonFiniteError(
            f"step {step}: {what}; expected finite numbers. The last good checkpoint is {last or 'the start'}; "
            f"{remedy}, or use float32"
        )

    def _seed(self, step: int) -> None:
        """Random numbers (dropout) depend on seed, step and rank alone, never on what ran before."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        set_seed((self.settings.seed * 1_000_003 + step * ranks + rank) % 2**32)

    def _responses(self, progress: Progress) -> dict[int, Response]:
        if progress.now[0] != progress.step:
            try:
                by_row = self.response_source.step(self._clock(progress))
            except LimbeckError:
                # Whoever writes sees no more than numbers that are none; the step that ruined them is known here.
                if progress.now[1]:
                    self._check_student(progress)
                raise
            progress.now = (progress.step, by_row)
        return progress.now[1]

    def _backward(
        self, batch: TokenBatch, signal: Signal | None, weight_B: Sequence[float], moment: StepSettings, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Backward of one micro-batch: what `StudentLoss` says of it beside the loss."""
        weight_N = torch.tensor(weight_B, device=batch.labels_N.device)[batch.sequence_N]
        with nullcontext() if last else self.accelerator.no_sync(self.model), onednn.linears():
            loss, sums, value_N = self.model(batch, signal, weight_N, moment)
            self.accelerator.backward(loss)
        return sums, value_N

    def _batch(self, rows: tuple[int, ...], by_row: Mapping[int, Response]) -> tuple[TokenBatch, Signal]:
        """Some rows as tensors on the device, and what the teacher says of them. None are one that does not count: all
        ranks meet at each pass."""
        batch = collate(by_row, rows or tuple(by_row)[-1:], pad_id=self.pad_id)
        signal = self.teacher.signal(batch)
        return batch.to(self.accelerator.device), signal

    def _clip(self) -> float:
        limit = self.settings.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        return float(norm)  # type: ignore[arg-type]

    def save(self, progress: Progress) -> None:
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
            keep=self.settings.save_total_limit,
        )
        progress.saved = progress.step

    def resume(self) -> Progress:
        """Where to start: the newest checkpoint, or the beginning. Later lines of metrics.jsonl are dropped."""
        newest = checkpoints.usable(self.context.checkpoints, self.context.console.warn)
        progress = Progress()
        if newest is not None:
            state = checkpoints.restore(newest, model=self.module, optimizer=self.optimizer.optimizer)  # type: ignore[attr-defined]
            if state["step_rows"] != self.step_rows:
                per_rank = self.step_rows // self.accelerator.num_processes
                raise LimbeckError(
                    f"{newest} was made with {state['step_rows']} responses a step and this launch has "
                    f"{self.step_rows}; launch {state['step_rows'] // per_rank} processes again, or delete "
                    f"{newest.parent} to train from the start"
                )
            progress = Progress.of(state)
            self.response_source.restore(state["response_source"])
            self.journal.restore(state)
        self.journal.rewind(progress.step)
        return progress
