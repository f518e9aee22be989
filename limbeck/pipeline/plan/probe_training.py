"""The training step of a probe, and the measurement of held-out responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from limbeck.evaluation.fidelity import chunk_of, values_of
from limbeck.models.heads import head_of
from limbeck.models.vocabulary import real_vocab_size
from limbeck.objectives import SparseForm
from limbeck.pipeline.build import loss_plan_of, sparse_form, temperature_of, token_weighting_of
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan.budget import Budget, TimeIsUp
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.probe_pieces import MOST_PASSES, drawn_texts
from limbeck.pipeline.sampled_responses import pad_token_id
from limbeck.rollouts.sources import SourceContext, StatelessSource, StepCounter
from limbeck.training.learning_rate import first_guess
from limbeck.training.loop import training_run
from limbeck.training.metrics import LoopContext
from limbeck.training.progress import Progress
from limbeck.training.run import TrainingRun
from limbeck.types import DenseSignal, Head, LimbeckError, Response, Signal, TokenBatch

# A forward and a backward pass in forward passes, with what is computed again and the loss: a guess, made before one is
# begun.
PASSES = 5


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The texts that are timed.

    Attributes:
        row, answer: tokens of a text, and of its answer.
        per_token: seconds of each token in a forward pass.
    """

    row: int
    answer: int
    per_token: float

    def rows(self, most: int, budget: Budget, *, least: int = 1) -> int:
        """Texts of a batch, multiples of `least`, of which two passes forward and back fit in the time.

        Raises:
            TimeIsUp: there is no time for `least` of them.
        """
        rows, each = most, PASSES * self.per_token * self.row
        while rows > least and each * rows > budget.left / 2:
            rows = max(rows // 2 // least * least, least)
        budget.check(each * rows)
        return rows


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of an optimizer step: of each token of its texts, and of the update.

    Attributes:
        first: what the first step took more than those after it, as a loss that is compiled does.
    """

    token: float
    update: float
    first: float


@dataclass
class _DrawnTeacher:
    """A teacher whose signal takes no time: random states of the shape of its own, each made once."""

    head: Head
    form: SparseForm | None
    known: dict[int, Signal] = field(default_factory=dict)

    def signal(self, batch: TokenBatch) -> Signal:
        count = int(batch.loss_mask_BT.sum())
        if count not in self.known:
            dense = DenseSignal(
                hidden_ND=self.head.weight_VD.new_empty(count, self.head.weight_VD.shape[1]).normal_(), head=self.head
            )
            self.known[count] = dense if self.form is None else self.form.of(dense, seed=0)
        return self.known[count]


def drawn_teacher(context: RunContext, case: Case, vocab_size: int, form: SparseForm | None) -> _DrawnTeacher:
    """A teacher of random states and a random head."""
    rows = max(case.frame.vocab_size, vocab_size)
    width = case.frame.width or case.student.model.width
    weight_VD = torch.randn(rows, width, device=context.device) / width**0.5
    return _DrawnTeacher(head=Head(weight_VD=weight_VD, vocab_size=vocab_size), form=form)


@dataclass
class _SameStep(StatelessSource):
    """The same responses in every step."""

    by_row: Mapping[int, Response]
    steps_per_epoch: int = 1

    @property
    def prompts(self) -> frozenset[str]:
        return frozenset(response.prompt_id for response in self.by_row.values())

    def step(self, clock: StepCounter) -> dict[int, Response]:
        return dict(self.by_row)

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return [dict(self.by_row)]

    @classmethod
    def of(cls, by_row: Mapping[int, Response], context: SourceContext) -> _SameStep:
        return cls(by_row=by_row)


def training_seconds(
    context: RunContext,
    case: Case,
    student: Any,
    tokenizer: Any,
    budget: Budget,
    shape: TextShape,
    folder: Path,
) -> StepCost:
    """Seconds of micro-batches of the recipe's shape, or of fewer rows where there is no time for all.

    Raises:
        TimeIsUp: there is no time for one row.
    """
    recipe = context.recipe
    if recipe.teacher.across is not None:
        raise LimbeckError("the teacher has other tokens than the student, which the probe does not draw")
    least = 2 if recipe.responses.source.paired else 1
    rows = shape.rows(recipe.train.per_device_train_batch_size, budget, least=least)
    run = _prepared(context, case, student, tokenizer, _texts(recipe, rows, shape), folder)
    gradients, updates = [], []
    rate = first_guess(case.student.model.width, adapters=case.student.adapters > 0) / 1000
    try:
        with budget.watching(student):
            for step in range(MOST_PASSES + 1):
                budget.check(gradients[-1] + updates[-1] if len(gradients) > 1 else 0.0)
                taken = _step(run, step, rate, budget)
                gradients.append(taken[0])
                updates.append(taken[1])
    except TimeIsUp:
        if not gradients:
            raise
    finally:
        student.eval()
        run.optimizer.zero_grad()
    usual = median(gradients[1:] or gradients), median(updates[1:] or updates)
    first = max(gradients[0] + updates[0] - sum(usual), 0.0)
    return StepCost(token=usual[0] / (rows * shape.row), update=usual[1], first=first)


def _texts(recipe: Any, rows: int, shape: TextShape) -> dict[int, Response]:
    """The texts of a step; of pairs, the second by the student."""
    texts = drawn_texts(rows, shape.row, shape.answer)
    if not recipe.responses.source.paired:
        written = recipe.on_policy
        return {i: replace(text, author="student" if written else text.author) for i, text in enumerate(texts)}
    return {
        i: replace(text, prompt_id=f"probe-{i // 2}", author="student" if i % 2 else "teacher", round=i % 2)
        for i, text in enumerate(texts)
    }


def _prepared(
    context: RunContext, case: Case, student: Any, tokenizer: Any, by_row: Mapping[int, Response], folder: Path
) -> TrainingRun:
    recipe, vocab_size = context.recipe, real_vocab_size(tokenizer)
    settings = replace(
        recipe.train,
        per_device_train_batch_size=len(by_row),
        gradient_accumulation_steps=1,
        max_steps=1000,
        sharding="none",
        report_to=(),
    )
    return training_run(
        student,
        partial(_SameStep.of, by_row),
        drawn_teacher(context, case, vocab_size, sparse_form(recipe)),
        loss_plan_of(recipe),
        temperature=temperature_of(recipe),
        schedule=recipe.objective.schedule,
        weighting=token_weighting_of(recipe),
        settings=settings,
        vocab_size=vocab_size,
        pad_id=pad_token_id(tokenizer),
        context=LoopContext(
            checkpoints=folder / "checkpoints", metrics=folder / "metrics.jsonl", learning_rate=folder / "rate.json"
        ),
    )


def _step(run: TrainingRun, step: int, rate: float, budget: Budget) -> tuple[float, float]:
    """Seconds of the gradients of a step, and of its update."""
    progress = Progress(step=step)
    began = budget.clock()
    run.passes.seed(step)
    by_row = run.response_source.step(StepCounter(step=step, total=run.total))
    run.gradients(by_row, run.settings_at(progress), progress)
    passed = budget.clock()
    run.passes.clip()
    run.passes.update(rate)
    return passed - began, budget.clock() - passed


def measuring_seconds(
    context: RunContext,
    case: Case,
    student: Any,
    tokenizer: Any,
    budget: Budget,
    shape: TextShape,
) -> float:
    """Seconds of each token in a measurement of fidelity beside a teacher whose signal is there.

    Raises:
        TimeIsUp: there is no time for one row.
    """
    rows = shape.rows(SCORING_BATCH_SIZE, budget)
    vocab_size = real_vocab_size(tokenizer)
    texts = dict(enumerate(drawn_texts(rows, shape.row, shape.answer)))
    teacher = drawn_teacher(context, case, vocab_size, None)
    head = head_of(student, vocab_size, verify=False)
    times: list[float] = []
    try:
        with budget.watching(student):
            for _ in _until(budget, times):
                values_of(chunk_of(student, head, texts, range(rows), teacher, device=context.device), top_k=2)
    except TimeIsUp:
        if not times:
            raise
    return median(times[1:] or times) / (rows * shape.row)


def _until(budget: Budget, times: list[float]) -> Iterator[None]:
    """Passes, each timed into a list, while there is time for one more like the last."""
    while len(times) < MOST_PASSES:
        budget.check(times[-1] if len(times) > 1 else 0.0)
        began = budget.clock()
        yield
        times.append(budget.clock() - began)
