"""The training loop: one optimizer step after another, on accelerate.

A step is: the responses that its source gives, cut into micro-batches; each micro-batch's teacher signal and student
hidden states; the objective's per-token values, weighted so that they add up to a mean over the whole step, all ranks
and accumulation steps; backward; clip; update. The order of the data, the learning rate, the response source and the
weights are functions of the step number and of what is in the checkpoint, so a training that continues from one is the
training that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import nsmallest
from types import MappingProxyType

from torch import nn

from limbeck.models.forward import require_rows_apart
from limbeck.models.whole import whole
from limbeck.objectives import Temperature, TemperatureSchedule
from limbeck.recipe.sections import TrainSection
from limbeck.rollouts.collate import collate
from limbeck.rollouts.sources import SourceContext, SourceFactory
from limbeck.runtime.memory import give_back_freed
from limbeck.training import launch, schedules, sharding
from limbeck.training.best_student import MeasureFidelity
from limbeck.training.corpus import Corpus
from limbeck.training.gradients import GradientPasses
from limbeck.training.loss import LossPlan, StudentLoss, make_projection
from limbeck.training.metrics import EXAMPLES, Journal, LoopContext
from limbeck.training.micro_batches import MicroBatches
from limbeck.training.rate_search import search_rate, settings_with_rate
from limbeck.training.run import FollowingWeights, TrainingRun
from limbeck.training.weighting import TokenWeighting
from limbeck.types import LimbeckError, Response, SignalSource


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
    average: FollowingWeights | None = None,
    settings: TrainSection,
    vocab_size: int,
    pad_id: int,
    context: LoopContext,
) -> nn.Module:
    """Train the student in place and return it; continues from the newest checkpoint where there is one.

    Args:
        author: makes the response source of the training; the rows of `teacher` signals are the numbers of its
            responses.
        loss_plan: the objective of each author's responses.
        schedule: options of the objective that change linearly from one value to another over the training.
        weighting: weights of the teacher's and the student's responses against each other; None treats all alike.
        heldout: responses whose loss is measured where the response source needs it.
        development: responses, by the teacher's number, whose loss is measured every `settings.eval_steps`; the student
            of the lowest is returned where the settings say so.
        fidelity: gives further metrics of the student on those, by name; logged beside their loss.
        corpus: text whose cross-entropy is added to the loss of every step.
        average: weights of a teacher that follow the student's after every step.
        vocab_size: real token ids of the pair.

    Raises:
        NonFiniteError: NaN or inf in a loss or gradient, naming the step.
        Interrupted: `context.should_stop` was true; a checkpoint of the finished step is on disk.
        LimbeckError: nothing is held out for a source that needs its loss, or pairs would be cut apart.
    """
    run = training_run(
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
        average=average,
        settings=settings,
        vocab_size=vocab_size,
        pad_id=pad_id,
        context=context,
    )
    progress = run.resume()
    try:
        rated = settings_with_rate(run, progress)
        run.warn_of_rounding(rated)
        run.run(progress, schedules.learning_rate(rated, run.total))
        run.evaluation.restore_best(progress)
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
    run = training_run(
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
    search_rate(run)
    student.eval()


def training_run(
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
    average: FollowingWeights | None = None,
    settings: TrainSection,
    vocab_size: int,
    pad_id: int,
    context: LoopContext,
) -> TrainingRun:
    """The parts of a training, ready to run; see `train`."""
    give_back_freed()  # moments of a first stage or of a search
    accelerator = launch.accelerator(
        settings, context.checkpoints.parent, run_name=context.run_name, tracker_config=context.tracker_config
    )
    if sharding.is_asked(settings):
        sharding.shard(student, accelerator, bf16=settings.bf16)
    if settings.packing:
        _check_rows_apart(student, pad_id)
    step_rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    response_source = author(
        SourceContext(
            step_rows=step_rows,
            seed=settings.seed,
            world=launch.Ranks(accelerator),
            whole_student=partial(whole, student),
        )
    )
    if response_source.wants_validation and not heldout:
        raise LimbeckError("the author asks for the held-out loss and got no held-out responses; expected at least one")
    _check_pairs_together(loss_plan, settings)
    total = schedules.total_steps(settings, response_source.steps_per_epoch)
    student.train()
    projection_ED = None
    if any("hidden" in objective.reads for objective in loss_plan.objectives):
        row, response = next(iter(response_source.preview(1, total)[0].items()))
        one = collate({row: response}, (row,), pad_id=pad_id)
        projection_ED = make_projection(student, teacher, one, vocab_size=vocab_size, seed=settings.seed)
    loss_module = StudentLoss(
        student,
        loss_plan,
        vocab_size=vocab_size,
        projection_ED=projection_ED,
        compile=settings.compile,
        packed=settings.packing,
    )
    optimizer = launch.optimizer(loss_module, settings)
    model, optimizer = launch.prepared(accelerator, loss_module, optimizer)
    passes = GradientPasses(
        accelerator=accelerator,
        model=model,
        module=loss_module,
        optimizer=optimizer,
        micro_batches=MicroBatches.of(teacher, accelerator.device, pad_id),
        corpus=corpus,
        settings=settings,
        pad_id=pad_id,
        should_stop=context.should_stop,
    )
    return TrainingRun(
        accelerator=accelerator,
        module=loss_module,
        optimizer=optimizer,
        passes=passes,
        temperature=temperature,
        schedule=schedule,
        weighting=weighting or TokenWeighting(reduction=settings.reduction),
        response_source=response_source,
        heldout=heldout,
        development=development,
        fidelity=fidelity,
        average=average,
        settings=settings,
        step_rows=step_rows,
        pad_id=pad_id,
        context=context,
        total=total,
        journal=Journal(
            accelerator=accelerator,
            context=context,
            authored=loss_plan.authored,
            watched=frozenset(nsmallest(EXAMPLES, response_source.prompts)) if loss_plan.authored else frozenset(),
        ),
    )


def _check_rows_apart(student: nn.Module, pad_id: int) -> None:
    """Check, on two rows, that a student that reads rows one after another keeps them apart."""
    short, long = (
        Response(prompt_id="", author="data", prompt_ids=(1, 2), response_ids=(3,) * length, stop="length")
        for length in (3, 6)
    )
    rows = collate([long, short], (0, 1), pad_id=pad_id)
    sharding.in_root(student, require_rows_apart, student, rows.to(next(student.parameters()).device))


def _check_pairs_together(loss_plan: LossPlan, settings: TrainSection) -> None:
    """Check that no micro-batch cuts two responses apart that a rule compares."""
    if loss_plan.rule is not None and loss_plan.rule.pairs and settings.per_device_train_batch_size % 2:
        raise LimbeckError(
            f"train.per_device_train_batch_size is {settings.per_device_train_batch_size} and the rule "
            f"{loss_plan.rule.name} compares pairs side by side; expected an even number"
        )
