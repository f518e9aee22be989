"""Disk that a run takes: what is there at its end, and the most that is there meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.models.devices import GIB
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.memory import state_bytes
from limbeck.pipeline.plan.sizes import BYTES
from limbeck.teachers.store.estimate import Length, estimate, total_bytes

# Prompts, responses, scores, metrics and the report of a run: in all, and what steps, texts and ids add to them.
_SMALL, _OF_STEP, _OF_TEXT, _OF_HELDOUT, _OF_ID = 300_000, 330, 540, 5_500, 10


@dataclass(frozen=True, kw_only=True)
class Part:
    """Files of a run.

    Attributes:
        end: bytes at the end of the run.
        most: bytes at most on the way there.
        known: whether they follow from sizes alone, whatever is written in the texts.
    """

    name: str
    end: int
    most: int
    known: bool = True


def disk_of(case: Case, *, tokenizer_bytes: int = 0) -> list[Part]:
    """What a run leaves on disk, and needs meanwhile.

    Args:
        tokenizer_bytes: of the tokenizer's files, which are saved with the student.
    """
    train, student = case.recipe.train, case.student
    weights = student.trained * student.number_bytes
    # A new best student, and the moments and weights of a checkpoint, are written before the old ones go.
    checkpoint = weights + int(state_bytes(case))
    # The last step has a checkpoint only where the student is sharded; else the student itself is there.
    written = len(_steps_saved(case)) + case.sharded
    saved, meanwhile = (min(written, train.save_total_limit + more) for more in (0, 1))
    best, most_best = _best_students(case)
    # The start of a trial is there before any checkpoint is.
    tried = weights * (train.learning_rate == "auto")
    # One that is sharded is gathered in files before it is saved.
    gathered, saved_student = student_bytes(case) * case.sharded, student_bytes(case) + tokenizer_bytes
    start = student_bytes(case) * (case.sharded and case.written_first)
    parts = [
        Part(name="signal", end=signal_bytes(case), most=signal_bytes(case), known=case.work.exact),
        Part(name="signal windows", end=0, most=window_bytes(case), known=False),
        Part(name="checkpoints", end=saved * checkpoint, most=max(meanwhile * checkpoint, tried)),
        Part(name="best student", end=weights * best, most=weights * most_best),
        Part(name="first stage", end=weights * (case.steps.first > 0), most=weights * (case.steps.first > 0)),
        Part(name="start of the student", end=0, most=start),
        Part(name="rounds", end=round_bytes(case), most=round_bytes(case), known=False),
        Part(name="student", end=saved_student, most=saved_student + gathered),
        Part(name="other files", end=small_bytes(case), most=small_bytes(case), known=False),
    ]
    return [part for part in parts if part.most]


def end_bytes(parts: Sequence[Part]) -> int:
    return sum(part.end for part in parts)


def most_bytes(parts: Sequence[Part]) -> int:
    return sum(part.most for part in parts)


def signal_bytes(case: Case) -> int:
    """Bytes of the teacher's signal of all texts that are scored."""
    if not case.stores_signal or (case.teacher is None and case.recipe.teacher.support == "full"):
        return 0
    before = not case.recipe.on_policy or case.recipe.sft_on_responses
    scored = case.captures or (before and case.recipe.teacher.keeps_whole)
    texts = case.answered if scored else 0
    train = _lengths(round(texts * case.work.train.answer), texts)
    held = _lengths(case.work.heldout.tokens, case.work.heldout.count)
    codec, heldout = case.codecs
    return total_bytes(estimate(codec, heldout, case.frame, train, held, number_bytes=BYTES[case.recipe.teacher.dtype]))


def window_bytes(case: Case) -> int:
    """Signals of the steps that come next, at most, where the whole signal is not kept."""
    limit = case.recipe.teacher.cache_limit_gib
    if limit is None:
        return 0
    return min(round(limit * GIB), round(case.work.train.tokens * case.signal_bytes[0]))


def _lengths(tokens: int, count: int) -> list[Length]:
    """So many texts that have so many tokens together."""
    if not count:
        return []
    each, left = divmod(tokens, count)
    return [Length(loss=each + (i < left), ids=0) for i in range(count)]


def student_bytes(case: Case) -> int:
    return case.student.model.parameters * case.student.number_bytes


def round_bytes(case: Case) -> int:
    """The responses of all rounds, and the signals of those of one, which are kept until the next one is written."""
    steps = round_steps(case)
    if steps is None:
        return 0
    tokens = min(steps, case.steps.main) * case.steps.rows * case.work.train.answer * case.stores_signal
    return round(tokens * case.signal_bytes[0]) + _of_rounds(case, steps)


def round_steps(case: Case) -> int | None:
    """Optimizer steps that share a round of responses on disk; None where each has its own, or the student none."""
    source = case.recipe.responses.source
    if not source.on_policy:
        return None
    steps: int = source.round_steps or case.steps.per_epoch  # type: ignore[attr-defined]
    # Between one step and the next nothing is read again.
    return steps if steps > 1 else None


def _steps_saved(case: Case) -> set[int]:
    """The steps before the last one that have a checkpoint: where it is due, and where a round begins."""
    main, every = case.steps.main, case.recipe.train.save_steps
    found = set(range(every, main, every))
    if (steps := round_steps(case)) is not None:
        found |= set(range(steps, main, steps))
    return found


def small_bytes(case: Case) -> int:
    """Text files of a run, roughly: all grow with texts and steps, and none of them with the models."""
    steps, work = case.steps, case.work
    answered = round(case.answered * work.train.mean) + work.heldout.ids
    texts = work.count * _OF_TEXT + work.heldout.count * _OF_HELDOUT + answered * _OF_ID
    return _SMALL + _OF_STEP * (steps.main + steps.first) + texts


def _of_rounds(case: Case, steps: int) -> int:
    """Lines and tables of the responses of all rounds, which stay."""
    written = math.ceil(case.steps.main / steps) * min(steps, case.steps.per_epoch, case.steps.main) * case.steps.rows
    return round(written * (_OF_TEXT + case.work.train.mean * _OF_ID))


def _best_students(case: Case) -> tuple[int, int]:
    """Best students at the end and at most, where each that is measured is better than the one before: those that kept
    checkpoints name, and the last one."""
    train, main = case.recipe.train, case.steps.main
    if not (train.eval_steps and case.steps.aside and train.load_best_model_at_end):
        return 0, 0
    measured = [step // train.eval_steps * train.eval_steps for step in sorted(_steps_saved(case))]
    end, meanwhile = (len({*measured[-train.save_total_limit - more :], main}) for more in (0, 1))
    # A new one is written before an old one goes.
    return end, meanwhile + 1


def tokenizer_bytes(folder: Path) -> int:
    """Bytes of a tokenizer's files in the folder of a model."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def measured_bytes(root: Path) -> int:
    """Bytes of a run's folder; files that have two names in it count once."""
    seen: dict[tuple[int, int], int] = {}
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())
