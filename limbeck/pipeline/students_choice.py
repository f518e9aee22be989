"""The student's own likeliest tokens in a run's signals: by its start before training, by its weights meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from limbeck.models.vocabulary import real_vocab_size
from limbeck.models.whole import reader_copy
from limbeck.pipeline.build import sparse_form
from limbeck.pipeline.capturing import Captured, capture_into
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.initial_student import student_before_teaching
from limbeck.student.build import Student
from limbeck.teachers.base import Teacher
from limbeck.teachers.chosen import StudentsChoice, likeliest_of
from limbeck.teachers.store.writer import StoreWriter
from limbeck.types import DenseSignal, Json, Response, Signal, TokenBatch


def choosing(context: RunContext, teacher: Teacher, student: Student) -> Teacher:
    """The teacher, asked for the tokens that a student finds likeliest too, as it is when a text is scored."""
    form, count = sparse_form(context.recipe), context.recipe.teacher.student_k
    if not count:
        return teacher
    assert form is not None, "see limbeck.recipe.teacher_checks"
    vocab_size = real_vocab_size(student.tokenizer)

    def choose(batch: TokenBatch) -> Tensor:
        return likeliest_of(reader_copy(student.model), batch, count=count, vocab_size=vocab_size)

    def keep(signal: DenseSignal, chosen_NS: Tensor) -> Signal:
        return form.of(signal, seed=0, chosen_NS=chosen_NS)

    return StudentsChoice.of(teacher, choose, keep)


def capture_with_choice(
    context: RunContext,
    writer: StoreWriter,
    responses: Sequence[Response],
    *,
    sampling: Json | None = None,
    advance: Callable[[int], None],
) -> Captured:
    """Score responses with the choice of the student that training begins with; of held-out ones all is kept where the
    teacher says that much."""
    teacher, passes = context.teacher, []
    chosen = choosing(context, teacher, student_before_teaching(context))
    whole = "hidden" in teacher.provides
    for asked, some in (
        (chosen, [r for r in responses if r.split == "train" or not whole]),
        (teacher, [r for r in responses if r.split == "heldout" and whole]),
    ):
        if some:
            passes.append(capture_into(writer, asked, some, reads=teacher.reads, sampling=sampling, advance=advance))
            writer.flush()
    return Captured(
        added=sum(one.added for one in passes),
        found=sum(one.found for one in passes),
        tokens=sum(one.tokens for one in passes),
    )
