"""The training loop: one optimizer step after another, on accelerate.

A step is: its rows, cut into micro-batches; each micro-batch's teacher signal and student hidden states; the
objective's per-token values, weighted with 1 / (valid tokens of the whole step, over all ranks and accumulation steps);
backward; clip; update. The order of the data, the learning rate and the divisor are functions of the step number, so a
run that continues from a checkpoint is the run that was never interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from limbeck import onednn
from limbeck.config import TrainSection
from limbeck.console import Console, Meter, QuietConsole
from limbeck.flow import LimbeckError, Response, Support, Teacher
from limbeck.objectives import Temperature, TemperatureSchedule
from limbeck.objectives.registry import AnyObjective
from limbeck.student import checkpoints, launch, schedules
from limbeck.student.batches import Plan, collate, micro_batches
from limbeck.student.loss import Moment, StudentLoss, make_projection

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteError(LimbeckError):
    """The loss or its gradient is NaN or infinite; raised before the weights are touched."""


class Interrupted(Exception):
    """The loop was asked to stop and has written a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LoopContext:
    """What the loop reports to, and where it may stop.

    Attributes:
        checkpoints: folder for checkpoints.
        metrics: JSON lines, one a logging step.
        console: where progress is shown.
        should_stop: asked after each step; True writes a checkpoint and raises `Interrupted`.
    """

    checkpoints: Path
    metrics: Path
    console: Console = field(default_factory=QuietConsole)
    should_stop: Callable[[], bool] = lambda: False
    tracker_config: dict[str, Any] = field(default_factory=dict)
    run_name: str = "limbeck"


def train(
    student: nn.Module,
    responses: Sequence[Response],
    teacher: Teacher,
    objective: AnyObjective,
    *,
    temperature: Temperature | TemperatureSchedule,
    support: Support = "full",
    schedule: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    settings: TrainSection,
    vocab_size: int,
    pad_id: int,
    context: LoopContext,
) -> nn.Module:
    """Train the student in place and return it; continues from the newest checkpoint where there is one.

    Args:
        responses: training rows; the rows of `teacher` signals are their positions in this list.
        support: of the teacher's signals.
        schedule: options of the objective that move in a line from one value to another over the training.
        vocab_size: real token ids of the pair.

    Raises:
        NonFiniteError: NaN or inf in a loss or gradient, naming the step.
        Interrupted: `context.should_stop` said so; a checkpoint of the finished step is on disk.
    """
    if not responses:
        raise LimbeckError("got no responses to train on; expected at least one, check the prompts and their lengths")
    accelerator = launch.accelerator(
        settings, context.checkpoints.parent, run_name=context.run_name, tracker_config=context.tracker_config
    )
    step_rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    plan = Plan.of(responses, step_rows=step_rows, seed=settings.seed)
    total = schedules.total_steps(settings, plan.steps_per_epoch)
    rate_of = schedules.learning_rate(settings, total)
    student.train()
    loss_module = StudentLoss(
        student,
        objective,
        support=support,
        vocab_size=vocab_size,
        projection_ED=make_projection(
            student, objective, teacher, responses, vocab_size=vocab_size, pad_id=pad_id, seed=settings.seed
        ),
        compile=settings.compile,
    )
    optimizer = launch.adamw(loss_module, settings)
    model, optimizer = accelerator.prepare(loss_module, optimizer)
    run = _Run(
        accelerator=accelerator,
        model=model,
        module=loss_module,
        optimizer=optimizer,
        temperature=temperature,
        schedule=schedule,
        plan=plan,
        responses=responses,
        teacher=teacher,
        settings=settings,
        pad_id=pad_id,
        context=context,
        total=total,
    )
    progress = run.resume()
    try:
        run.play(progress, rate_of)
    finally:
        # Not accelerate's end_training: that would also end the process group, which is the launcher's.
        for tracker in accelerator.trackers:
            tracker.finish()
    student.eval()
    return student


@dataclass
class _Progress:
    """How far a run has come. All of it is in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch_steps: tuple[int, list[tuple[int, ...]]] = (-1, [])


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a running loop."""

    accelerator: Accelerator
    model: nn.Module
    module: StudentLoss
    optimizer: torch.optim.Optimizer
    temperature: Temperature | TemperatureSchedule
    schedule: Mapping[str, tuple[float, float]]
    plan: Plan
    responses: Sequence[Response]
    teacher: Teacher
    settings: TrainSection
    pad_id: int
    context: LoopContext
    total: int

    def play(self, progress: _Progress, rate_of: Callable[[int], float]) -> None:
        """All steps that are left, with checkpoints on the way."""
        tokens = self.plan.total_tokens(self.total)
        with self.context.console.meter("train", tokens, "tokens", progress.tokens) as meter:
            while progress.step < self.total:
                stop = self.step(progress, rate_of(progress.step), meter)
                due, last = progress.step % self.settings.save_steps == 0, progress.step == self.total
                if stop or due or last:
                    self._check_student(progress)
                if (stop or due) and not last:
                    self.save(progress)
                    if stop:
                        raise Interrupted(f"stopped after step {progress.step} of {self.total}")

    def step(self, progress: _Progress, rate: float, meter: Meter) -> bool:
        """One optimizer step and its metrics; advances `progress` and says whether any rank was asked to stop."""
        started = time.perf_counter()
        self._seed(progress.step)
        rows, moment = self._rows(progress), self._moment(progress.step)
        tokens = self.plan.step_tokens(rows)
        means, stop = self._gradients(rows, moment, tokens)
        loss = means["loss"]
        grad_norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(
                progress.step + 1, f"loss {loss}, gradient norm {grad_norm}", begun=progress.step > 0
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        metrics = {
            "step": progress.step,
            "epoch": round(progress.step / self.plan.steps_per_epoch, 4),
            **means,
            "learning_rate": rate,
            **({} if moment.temperature is self.temperature else {"temperature": moment.temperature.loss}),
            **moment.options,
            "grad_norm": grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": round(progress.seconds, 3),
            "padding": round(self._padding(rows), 4),
        }
        self._record(progress, metrics)
        meter.advance(tokens, f"step {progress.step}/{self.total}, loss {loss:.3f}")
        return stop

    def _moment(self, step: int) -> Moment:
        share = step / max(self.total - 1, 1)
        return Moment(temperature=self.temperature.at(share), options=schedules.moved(self.schedule, share))

    def _gradients(self, rows: tuple[int, ...], moment: Moment, tokens: int) -> tuple[dict[str, float], bool]:
        """The gradients of the step; means of what is logged and whether a rank was asked to stop, over all ranks."""
        sums = torch.zeros(len(self.module.stats), device=self.accelerator.device)
        micros = micro_batches(
            rows,
            rows_per_device=self.settings.per_device_train_batch_size,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        for i, micro in enumerate(micros):
            # DDP averages over ranks, the step sums over them: hence the factor.
            weight = self.accelerator.num_processes / tokens
            sums += self._backward(micro, moment, weight=weight, last=i == len(micros) - 1, rows=rows)
        # Ranks must agree to stop at the same step, so the wish travels with the loss.
        wish = torch.tensor([float(self.context.should_stop())], device=sums.device)
        *summed, stop = self.accelerator.reduce(torch.cat([sums, wish]), reduction="sum").tolist()  # type: ignore[union-attr]
        return {name: value / tokens for name, value in zip(self.module.stats, summed, strict=True)}, stop > 0

    def _not_finite(self, step: int, what: str, *, begun: bool) -> NonFiniteError:
        last = checkpoints.newest(self.context.checkpoints)
        remedy = "lower train.learning_rate and add --update" if begun else "look for NaN or inf in the loaded weights"
        return NonFiniteError(
            f"step {step}: {what}; expected finite numbers. The last good checkpoint is {last or 'the start'}; "
            f"{remedy}, or use float32"
        )

    def _check_student(self, progress: _Progress) -> None:
        """A student whose last update ruined it is neither kept nor handed on.

        Its loss on one row must be finite and so must the gradient: weights beyond all measure may still give a loss.
        """
        rows = self._rows(replace(progress, step=progress.step - 1))
        batch = collate(self.responses, rows[-1:], pad_id=self.pad_id).to(self.accelerator.device)
        weight_N = torch.ones_like(batch.labels_N, dtype=torch.float32)
        # Without the ranks: all have the same weights and take the same row.
        with self.accelerator.no_sync(self.model), onednn.linears():
            loss, _ = self.model(batch, None, weight_N, Moment())
            self.accelerator.backward(loss)
        value, grad_norm = loss.item(), self._clip()
        self.optimizer.zero_grad()
        if not (math.isfinite(value) and math.isfinite(grad_norm)):
            what = f"after the update loss {value}, gradient norm {grad_norm}"
            raise self._not_finite(progress.step, what, begun=True)

    def _seed(self, step: int) -> None:
        """Random numbers (dropout) depend on seed, step and rank alone, never on what ran before."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        set_seed((self.settings.seed * 1_000_003 + step * ranks + rank) % 2**32)

    def _rows(self, progress: _Progress) -> tuple[int, ...]:
        epoch, index = divmod(progress.step, self.plan.steps_per_epoch)
        if progress.epoch_steps[0] != epoch:
            progress.epoch_steps = (epoch, self.plan.epoch(epoch))
        return progress.epoch_steps[1][index]

    def _backward(
        self, micro: tuple[int, ...], moment: Moment, *, weight: float, last: bool, rows: tuple[int, ...]
    ) -> Tensor:
        """Backward of one micro-batch. An empty one runs on a row of weight 0: all ranks meet in the backward."""
        batch = collate(self.responses, micro or rows[-1:], pad_id=self.pad_id)
        signal = self.teacher.signal(batch)
        batch = batch.to(self.accelerator.device)
        weight_N = torch.full_like(batch.labels_N, weight if micro else 0.0, dtype=torch.float32)
        with nullcontext() if last else self.accelerator.no_sync(self.model), onednn.linears():
            loss, sums = self.model(batch, signal, weight_N, moment)
            self.accelerator.backward(loss)
        return sums if micro else torch.zeros_like(sums)

    def _clip(self) -> float:
        limit = self.settings.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        return float(norm)  # type: ignore[arg-type]

    def _padding(self, rows: tuple[int, ...]) -> float:
        """Share of the step's positions that are padding."""
        size = self.settings.per_device_train_batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        area = sum(max(self.plan.lengths[r] for r in chunk) * len(chunk) for chunk in chunks)
        return 1 - sum(self.plan.lengths[r] for r in rows) / area

    def _record(self, progress: _Progress, metrics: dict[str, Any]) -> None:
        """Metrics to metrics.jsonl and the trackers at logging steps."""
        due = progress.step % self.settings.logging_steps == 0 or progress.step == self.total
        if due and self.accelerator.is_main_process:
            with self.context.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        if due:
            self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=progress.step)

    def save(self, progress: _Progress) -> None:
        checkpoints.save(
            self.context.checkpoints,
            progress.step,
            model=self.module,
            optimizer=self.optimizer.optimizer,  # type: ignore[attr-defined]
            state={"tokens": progress.tokens, "seconds": progress.seconds, "step_rows": self.plan.step_rows},
            keep=self.settings.save_total_limit,
        )

    def resume(self) -> _Progress:
        """Where to start: the newest checkpoint, or the beginning. Later lines of metrics.jsonl are dropped."""
        newest = checkpoints.newest(self.context.checkpoints)
        progress = _Progress()
        if newest is not None:
            state = checkpoints.restore(newest, model=self.module, optimizer=self.optimizer.optimizer)  # type: ignore[attr-defined]
            if state["step_rows"] != self.plan.step_rows:
                per_rank = self.plan.step_rows // self.accelerator.num_processes
                raise LimbeckError(
                    f"{newest} was made with {state['step_rows']} responses a step and this launch has "
                    f"{self.plan.step_rows}; launch {state['step_rows'] // per_rank} processes again, or delete "
                    f"{newest.parent} to train from the start"
                )
            progress = _Progress(step=state["step"], tokens=state["tokens"], seconds=state["seconds"])
        if self.accelerator.is_main_process:
            _keep_metrics(self.context.metrics, progress.step)
        return progress


def _keep_metrics(path: Path, step: int) -> None:
    from limbeck.rundir import write_text

    kept: list[str] = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            # A killed process may leave half a last line; it belongs to a step that is done again.
            if line.endswith("}") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))
