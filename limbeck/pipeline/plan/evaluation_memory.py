"""Memory of a rank at the peak of the evaluation, which has one whole model at a time wherever what it measures allows.

`limbeck.pipeline.evaluation_models` says when which model is there.
"""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.evaluation.groups.rouge import RougeGroup
from limbeck.evaluation.groups.speculation import SpeculationGroup
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.shared_terms import loss_bytes, sampling_terms
from limbeck.pipeline.plan.sizes import BYTES


def evaluation_terms(case: Case) -> Iterator[tuple[str, float]]:
    """The terms of its largest moment: one of the two models writes alone, or the student is measured.

    A stand-in is as large as the student, and in memory when no other student is.
    """
    yield from max((list(terms) for terms in _moments_of_evaluation(case)), key=lambda terms: sum(n for _, n in terms))


def _moments_of_evaluation(case: Case) -> Iterator[Iterator[tuple[str, float]]]:
    groups = case.recipe.evaluate.groups.values()
    # Beside references the teacher writes too, where there is one.
    asked = {"teacher_answers", "teacher_weights"}
    writes = any(asked & group.needs() or isinstance(group, RougeGroup) for group in groups)
    if case.writes_here and writes:
        yield _teacher_writes(case)
    yield _student_writes(case)
    if case.where == "in_process" and case.recipe.student.init == "width_prune" and case.recipe.student.model is None:
        yield _cut_out(case)
    yield _measured(case)


def _teacher_writes(case: Case) -> Iterator[tuple[str, float]]:
    assert case.teacher is not None, "a teacher in this process has a configuration"
    yield "teacher", case.teacher_held
    yield from sampling_terms(case, case.teacher, BYTES[case.recipe.teacher.dtype], case.recipe.evaluate.batch_size)
    if any(isinstance(group, SpeculationGroup) for group in case.recipe.evaluate.groups.values()):
        yield "student", _student_bytes(case)


def _student_writes(case: Case) -> Iterator[tuple[str, float]]:
    yield "student", _student_bytes(case)
    yield from sampling_terms(case, case.student.model, case.student.number_bytes, case.recipe.evaluate.batch_size)


def _cut_out(case: Case) -> Iterator[tuple[str, float]]:
    """The student before training, narrowed, which is built of copies beside the teacher that it is cut out of."""
    yield "student", case.student.held * case.student.number_bytes
    yield "teacher", case.teacher_bytes


def _measured(case: Case) -> Iterator[tuple[str, float]]:
    """The student beside the teacher where a group takes both, else beside the head of the stored signals."""
    groups = case.recipe.evaluate.groups.values()
    compared = any({"teacher", "tokens"} <= group.needs() for group in groups)
    yield "student", _student_bytes(case)
    if any(group.takes_both for group in groups) or (compared and not case.recipe.teacher.cache):
        yield "teacher", case.teacher_held
    elif compared and (case.here or case.recipe.teacher.support == "full"):
        yield "teacher's head", case.head_bytes
    yield "loss", loss_bytes(case, trained=False)


def _student_bytes(case: Case) -> int:
    """Bytes of the student's weights as it is saved."""
    return case.student.model.parameters * case.student.number_bytes
