"""Answers to problems, marked right or wrong: mathematics by math-verify, programs by their tests in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.evaluation.sandbox.host import Limits
from limbeck.evaluation.sandbox.log import verdicts_of
from limbeck.evaluation.tasks.code_answers import job_of, program_of
from limbeck.evaluation.tasks.math_answers import MathChecker, extract
from limbeck.evaluation.tasks.problems import CODE, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMark:
    """What was found of an answer.

    Attributes:
        failure: why it is not right ("wrong", "no answer", "timeout", or how a program ended); None where it is.
        extraction: where in the text the answer stood.
    """

    failure: str | None
    extraction: str

    @property
    def right(self) -> bool:
        return self.failure is None


def mark_answers(
    answers: Sequence[tuple[Problem, str]],
    limits: Limits,
    *,
    log: Path,
    scratch: Path,
    continues: bool,
    advance: Callable[[int], None],
) -> list[AnswerMark]:
    """Marks of answers to problems of one task, in order.

    Args:
        log: keeps the verdicts of programs: one that was run is not run again.
        scratch: a folder for the sandbox.
        continues: the model was given `Problem.plain`, a text to continue, rather than `Problem.request`.
        advance: is called with 1 after each.
    """
    if answers and answers[0][0].task in CODE:
        return _mark_programs(answers, limits, log, scratch, continues, advance)
    return _mark_maths(answers, advance)


def _mark_programs(
    answers: Sequence[tuple[Problem, str]],
    limits: Limits,
    log: Path,
    scratch: Path,
    continues: bool,
    advance: Callable[[int], None],
) -> list[AnswerMark]:
    programs = [program_of(problem, text, continues=continues) for problem, text in answers]
    jobs = [job_of(problem, program) for (problem, _), (program, _) in zip(answers, programs, strict=True)]
    failures: dict[int, str | None] = {}
    for number, verdict in verdicts_of(jobs, limits, log=log, scratch=scratch):
        failures[number] = None if verdict.passed else verdict.kind
        advance(1)
    return [AnswerMark(failure=failures[number], extraction=how) for number, (_, how) in enumerate(programs)]


def _mark_maths(answers: Sequence[tuple[Problem, str]], advance: Callable[[int], None]) -> list[AnswerMark]:
    marks = []
    with MathChecker() as checker:
        for problem, text in answers:
            found = extract(text)
            verdict = checker.check(problem.answer, found.answer)
            wrong = "timeout" if verdict == "timeout" else "no answer" if found.where == "none" else "wrong"
            marks.append(AnswerMark(failure=None if verdict == "equal" else wrong, extraction=found.where))
            advance(1)
    return marks
