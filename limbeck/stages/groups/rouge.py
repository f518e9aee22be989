"""The group `rouge`: greedy answers beside the teacher's."""

from __future__ import annotations

from limbeck.evaluation.rouge import rouge_l
from limbeck.flow import Sampling
from limbeck.recipe_evaluation import EvaluateSection
from limbeck.stages.exam import Exam, Group, Measured, Need


def greedy(section: EvaluateSection) -> Sampling:
    """How the answers are drawn that the report shows side by side."""
    return Sampling(max_new_tokens=section.max_new_tokens, temperature=0.0)


def _measure(exam: Exam) -> Measured:
    student, teacher = (exam.texts(who, greedy(exam.section)) for who in ("student", "teacher"))
    shared = [name for name in student if name in teacher]
    rows = rouge_l(shared, candidates=[student[name] for name in shared], references=[teacher[name] for name in shared])
    return Measured(tables={"": rows})


def _needs(section: EvaluateSection) -> frozenset[Need]:
    return frozenset({"teacher"} if "teacher" in section.rouge.against else ())


GROUP = Group(name="rouge", measure=_measure, needs=_needs)
