"""Time of each stage by what a probe found: seconds of a piece times the number of such pieces, term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.evaluation.groups.diversity import DiversityGroup
from limbeck.evaluation.groups.judge import JudgeGroup
from limbeck.evaluation.groups.rouge import RougeGroup
from limbeck.evaluation.groups.tasks import TasksGroup
from limbeck.evaluation.tasks.problems import read_problems
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.probe import ProbeResult
from limbeck.pipeline.plan.time import StageTime, measurements_of
from limbeck.pipeline.plan.workload import Texts
from limbeck.pipeline.plan.writing_cost import WritingCost
from limbeck.rollouts.engines import InProcess
from limbeck.student.pruning import ROWS, WINDOW
from limbeck.training.learning_rate import TRIAL_STEPS
from limbeck.training.rate_trials import MEASURED_RESPONSES

# Measurements of a block before it goes or stays, each of about half of a pass (`limbeck.student.pruning`).
REMEASURED = 3
Terms = dict[str, float]


def probed_times(case: Case, probe: ProbeResult) -> list[StageTime]:
    """Time of each stage of a rank; what ranks exchange is not in it."""
    stages = {
        "respond": (_responding(case, probe), case.work.tokens),
        "teach": (_teaching(case, probe), case.work.ids),
        "train": (
            _training(case, probe),
            round((case.steps.main + case.steps.first) * case.steps.rows * _answer(case)),
        ),
        "evaluate": (_evaluating(case, probe), 2 * case.work.heldout.tokens),
    }
    found = []
    for stage, (terms, tokens) in stages.items():
        kept = {name: seconds for name, seconds in terms.items() if seconds > 0}
        if kept:
            bound = max(kept, key=lambda name: kept[name])
            found.append(StageTime(stage=stage, tokens=tokens, seconds=sum(kept.values()), bound=bound, terms=kept))
    return found


def _responding(case: Case, probe: ProbeResult) -> Terms:
    recipe, work = case.recipe, case.work
    if recipe.base_author != "teacher" or probe.teacher_writes is None or recipe.responses.server is not None:
        return {}
    count = case.answered + work.heldout.count
    attempts = 1 if recipe.responses.verify is None else recipe.responses.verify.samples
    written = _written(probe.teacher_writes, probe, count * attempts / case.ranks, _prompt(work.train), case)
    return {"the teacher loads": probe.loading.get("teacher", 0.0), "the teacher writes": written}


def _teaching(case: Case, probe: ProbeResult) -> Terms:
    if not case.stores_signal or case.captures or not probe.teacher_scores:
        return {}
    recipe, work = case.recipe, case.work
    windowed = not recipe.teacher.keeps_whole
    train = 0 if windowed or (recipe.on_policy and not recipe.sft_on_responses) else _ids(work.train, probe, case)
    return {"the teacher scores": probe.teacher_scores * (train + _ids(work.heldout, probe, case)) / case.ranks}


def _training(case: Case, probe: ProbeResult) -> Terms:
    steps, work, recipe = case.steps, case.work, case.recipe
    terms: Terms = {"the student loads": probe.loading.get("student", 0.0)}
    if recipe.student.measured and probe.teacher_scores and case.teacher is not None:
        removed = max(case.teacher.blocks - case.student.model.blocks, 0)
        passes = (case.teacher.blocks + REMEASURED * removed) / 2
        terms["what stays of the teacher is measured"] = passes * ROWS * WINDOW * probe.teacher_scores
    row, cost = _row(work.train, probe, case), probe.training
    if cost is not None:
        step = steps.rows / case.ranks * row * cost.token + cost.update
        terms["the first step"] = cost.first
        terms["the steps"] = steps.main * step
        terms["the first stage"] = steps.first * step
        terms["the search for the learning rate"] = steps.searching * TRIAL_STEPS * step
    measured = steps.searching * MEASURED_RESPONSES
    terms["the search for the learning rate"] = terms.get("the search for the learning rate", 0.0) + (
        measured * row * (probe.student_scores or 0.0) / case.ranks
    )
    passes = 1 + ("fidelity" in recipe.evaluate.groups and recipe.teacher.support == "full")
    aside = measurements_of(case) * steps.aside * row / case.ranks
    terms["measurements on the way"] = aside * passes * (probe.measures or probe.student_scores or 0.0)
    if probe.student_writes is not None and isinstance(recipe.responses.engine, InProcess):
        each = steps.written / case.ranks
        terms["the student writes"] = _written(
            probe.student_writes, probe, each, _prompt(work.train), case, at_once=case.written_at_once
        )
    if probe.teacher_writes is not None:
        terms["the teacher writes again"] = _written(
            probe.teacher_writes, probe, steps.by_teacher / case.ranks, _prompt(work.train), case
        )
    if case.asks_teacher and case.here and probe.teacher_scores:
        # A signal in windows is scored once in each epoch.
        rows = steps.written if recipe.teacher.keeps_whole and recipe.on_policy else steps.main * steps.rows
        terms["the teacher scores"] = rows * row * probe.teacher_scores / case.ranks
    return terms


def _evaluating(case: Case, probe: ProbeResult) -> Terms:
    recipe, work = case.recipe, case.work
    section, held = recipe.evaluate, work.heldout
    once = probe.loading.get("teacher", 0.0) if case.here else 0.0
    # Before and after the training, and stand-ins, each of which is measured as a whole.
    students = 2 + len(section.stand_ins)
    terms: Terms = {"the models load": students * probe.loading.get("student", 0.0) + once}
    if "fidelity" in section.groups:
        terms["fidelity"] = students * _ids(held, probe, case) * (probe.measures or 0.0) / case.ranks
    limit = held.count if section.prompts is None else min(section.prompts, held.count)
    by_student, by_teacher = _answer_sets(section.groups, limit)
    most = section.max_new_tokens
    for name, cost, sets, count in (
        ("the student answers", probe.student_writes, students, by_student),
        ("the teacher answers", probe.teacher_writes, 1, by_teacher),
    ):
        if cost is not None:
            terms[name] = sets * _written(
                cost, probe, count / case.ranks, _prompt(held), case, at_once=section.batch_size, most=most
            )
    return terms


def _answer_sets(groups: Mapping[str, Any], held: int) -> tuple[float, float]:
    """Answers that a student and the teacher write for some groups; greedy ones are shared among them."""
    student, teacher, greedy = 0.0, 0.0, False
    for group in groups.values():
        if isinstance(group, RougeGroup):
            greedy |= "teacher" in group.against
            own = len(group.seeds) * held if "references" in group.against else 0
            student, teacher = student + own, teacher + own
        elif isinstance(group, DiversityGroup):
            asked = held if group.prompts is None else min(group.prompts, held)
            own = asked * group.samples * len(group.temperatures)
            student, teacher = student + own, teacher + own
        elif isinstance(group, JudgeGroup):
            greedy = True
        elif isinstance(group, TasksGroup):
            own = _problems(group, held) * group.samples
            student, teacher = student + own, teacher + own * group.teacher
    return student + greedy * held, teacher + greedy * held


def _problems(group: TasksGroup, held: int) -> int:
    found = sum(len(read_problems(task, path, group.limit)) for task, path in _files(group))
    return found + held * group.heldout


def _files(group: TasksGroup) -> Sequence[tuple[Any, Any]]:
    return [(task, Path(path)) for task, path in group.files.items()]


def _written(
    cost: WritingCost,
    probe: ProbeResult,
    count: float,
    prompt: float,
    case: Case,
    *,
    at_once: int | None = None,
    most: int | None = None,
) -> float:
    alive = probe.alive if most is None else probe.alive[:most]
    return cost.seconds(count, prompt, alive, at_once=at_once or case.recipe.responses.batch_size)


def _prompt(texts: Texts) -> float:
    """Tokens of a prompt."""
    return texts.mean - texts.answer


def _answer(case: Case) -> float:
    return case.work.train.answer


def _row(texts: Texts, probe: ProbeResult, case: Case) -> float:
    """Tokens of a text, with an answer as long as the probe takes it to become where none is written yet."""
    return texts.mean if case.work.exact else _prompt(texts) + sum(probe.alive)


def _ids(texts: Texts, probe: ProbeResult, case: Case) -> float:
    return texts.count * _row(texts, probe, case)
