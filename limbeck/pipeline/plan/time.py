"""Tokens, hours and money of each stage, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil

from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.rates import Rates, served_scores, served_writes
from limbeck.training.learning_rate import TRIAL_STEPS
from limbeck.training.rate_trials import MEASURED_RESPONSES

# A forward pass beside a forward and a backward pass.
FORWARD = 1 / 3


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Time of a stage.

    Attributes:
        tokens: that are written, scored or trained on.
        bound: what would have to be faster.
        terms: what the seconds are made of, where they were timed.
    """

    stage: str
    tokens: int
    seconds: float
    bound: str
    terms: Mapping[str, float] = field(default_factory=dict)


def times_of(case: Case, rates: Rates, *, server_devices: int = 0) -> list[StageTime]:
    """Time of each stage that computes.

    Args:
        server_devices: devices of a server of the teacher, which are not among the ranks.
    """
    return [stage for stage in _times(case, rates, server_devices) if stage.tokens]


def _times(case: Case, rates: Rates, server: int) -> Iterator[StageTime]:
    recipe, work = case.recipe, case.work
    if recipe.base_author == "teacher" and (case.writes_here or case.where == "server"):
        tokens = round(case.answered * work.train.answer) + work.heldout.tokens
        served = recipe.responses.server is not None or case.where == "server"
        alone = rates.teacher_writes * case.teacher_ranks
        rate = served_writes(case, max(server, 1)) if served else alone
        bound = "the server writes" if served else "the ranks write with the teacher"
        yield StageTime(stage="respond", tokens=tokens, seconds=_over(tokens, rate), bound=bound)
    if case.stores_signal and not case.captures and (case.here or case.where == "server"):
        ids = (0 if recipe.on_policy and not recipe.sft_on_responses else work.train.ids) + work.heldout.ids
        served = case.where == "server"
        rate = served_scores(case, max(server, 1)) if served else rates.teacher_scores * case.teacher_ranks
        bound = "the server scores" if served else "the ranks score with the teacher"
        yield StageTime(stage="teach", tokens=ids, seconds=_over(ids, rate), bound=bound)
    yield _training(case, rates, server)
    yield _evaluation(case, rates)


def _training(case: Case, rates: Rates, server: int) -> StageTime:
    steps, work, train = case.steps, case.work, case.recipe.train
    row = work.train.mean
    micros = train.gradient_accumulation_steps
    of_step = max(_over(steps.rows / case.ranks * row, rates.trains), rates.least_s * micros)
    exchange = rates.exchange_s * (micros if case.sharded else 1)
    step = max(of_step, exchange)
    trials = steps.searching * TRIAL_STEPS
    measured = steps.searching * MEASURED_RESPONSES + measurements_of(case) * steps.aside
    parts = {
        "the products of the student": (steps.main + steps.first + trials) * step
        + _over(measured * row / case.ranks, rates.student_scores),
        "one rank's share of what the student writes": _over(
            steps.written * work.train.answer / case.ranks, rates.student_writes
        ),
        "the teacher that writes again": _over(steps.by_teacher * work.train.answer / case.ranks, rates.teacher_writes),
        "the teacher that scores meanwhile": _scoring(case, rates, server),
    }
    if exchange > of_step:
        parts["what the ranks exchange"] = parts.pop("the products of the student")
    tokens = round((steps.main + steps.first) * steps.rows * work.train.answer)
    return StageTime(
        stage="train", tokens=tokens, seconds=sum(parts.values()), bound=max(parts, key=lambda name: parts[name])
    )


def measurements_of(case: Case) -> int:
    """Times that the loss on the responses set aside is measured: at the start, on the way and at the end."""
    every = case.recipe.train.eval_steps
    return 0 if not every or not case.steps.aside else 1 + ceil(case.steps.main / every)


def _scoring(case: Case, rates: Rates, server: int) -> float:
    """Seconds that the teacher scores while the student trains."""
    if not case.asks_teacher or not (case.here or case.where == "server"):
        return 0.0
    steps, row = case.steps, case.work.train.mean
    rows = steps.written if case.recipe.teacher.keeps_whole else steps.main * steps.rows
    if case.where == "server":
        return _over(rows * row, served_scores(case, max(server, 1)))
    return _over(rows * row / case.ranks, rates.teacher_scores)


def _evaluation(case: Case, rates: Rates) -> StageTime:
    """Greedy answers of both models and passes over the held-out responses, before and after the training.

    Stand-ins are measured like the student.
    """
    section, held = case.recipe.evaluate, case.work.heldout
    rows = held.count if section.prompts is None else min(section.prompts, held.count)
    answers = rows * min(section.max_new_tokens, case.recipe.responses.max_new_tokens)
    written = "rouge" in section.groups or "diversity" in section.groups
    students = 2 + len(section.stand_ins)
    seconds = students * _over(held.ids, rates.student_scores)
    tokens = students * held.tokens
    if written:
        seconds += students * _over(answers, rates.student_writes)
        tokens += students * answers
        if case.where in ("in_process", "server"):
            seconds += _over(answers, rates.teacher_writes)
            tokens += answers
    return StageTime(stage="evaluate", tokens=tokens, seconds=seconds / case.ranks, bound="the ranks write and measure")


def _over(amount: float, rate: float) -> float:
    return amount / rate if rate else 0.0
