"""Answers of the teacher that are checked before the student learns from them (`responses.verify`)."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.evaluation.context import text_behind
from limbeck.evaluation.sandbox.host import Limits, require_sandbox
from limbeck.evaluation.tasks.marking import AnswerMark, mark_answers
from limbeck.evaluation.tasks.problems import CODE, Problem
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.problems import read_prompt_problems
from limbeck.recipe.sections import VerifySection
from limbeck.types import Json, LimbeckError, Response, Sampling, TokenPrompt

WriteAgain = Callable[[Sequence[TokenPrompt], int], list[Response]]


def check_verification(context: RunContext) -> None:
    """Programs can be run here, where answers are programs.

    Raises:
        LimbeckError: this machine has no sandbox.
    """
    section = context.recipe.responses.verify
    if section is None or context.recipe.prompts.problems_of not in CODE or context.run.done("respond"):
        return
    with tempfile.TemporaryDirectory() as scratch:
        require_sandbox(Path(scratch), _limits(section))


def later_sampling(sampling: Sampling, attempt: int) -> Sampling:
    """How the answers of a later attempt are drawn: by a seed of their own."""
    return replace(sampling, seed=sampling.seed + attempt)


def verified(
    context: RunContext,
    responses: Sequence[Response],
    asked: Sequence[TokenPrompt],
    tokenizer: Any,
    write_again: WriteAgain,
) -> tuple[list[Response], Json]:
    """The responses with a right one for each training prompt that got one, and what the manifest says of it.

    Held-out responses stay as they are: how far the student is from the teacher is measured on what the teacher writes.

    Args:
        responses: the first answers.
        write_again: answers some prompts once more, given the number of the attempt from 1.

    Raises:
        LimbeckError: no training prompt got a right answer.
    """
    section = context.recipe.responses.verify
    assert section is not None
    problems = read_prompt_problems(context.run.problems)
    answers = {r.prompt_id: r for r in responses if r.split == "train"}
    waiting = [prompt for prompt in asked if prompt.id in answers]
    chosen: dict[str, Response] = {}
    by_attempt: list[int] = []
    failures: Counter[str] = Counter()
    for attempt in range(section.samples):
        if attempt:
            answers = {r.prompt_id: r for r in write_again(waiting, attempt)}
        texts = [(problems[prompt.id], text_behind(answers[prompt.id], tokenizer)) for prompt in waiting]
        marks = _marks(context, section, texts)
        right = [prompt for prompt, mark in zip(waiting, marks, strict=True) if mark.right]
        failures.update(mark.failure for mark in marks if mark.failure is not None)
        chosen |= {prompt.id: answers[prompt.id] for prompt in right}
        by_attempt.append(len(right))
        waiting = [prompt for prompt in waiting if prompt.id not in chosen]
        if not waiting:
            break
    prompts = len(chosen) + len(waiting)
    if prompts and not chosen and section.unverified == "drop":
        raise LimbeckError(
            f"responses.verify: none of {prompts} training prompts got a right answer in {section.samples} "
            f"(failures: {dict(failures)}); raise responses.verify.samples, set responses.verify.unverified=keep, or "
            "choose a better teacher"
        )
    left_out = len(waiting) if section.unverified == "drop" else 0
    context.console.say(
        f"respond: {len(chosen)} of {prompts} training prompts have a right answer"
        + (f", {left_out} are left out" if left_out else "")
        + (f", {len(waiting)} keep their first one" if waiting and not left_out else "")
    )
    kept = [
        chosen.get(r.prompt_id, r) for r in responses if r.split != "train" or r.prompt_id in chosen or not left_out
    ]
    record: Json = {"prompts": prompts, "right": len(chosen), "left_out": left_out, "by_attempt": by_attempt}
    return kept, {"verified": record | {"failures": dict(failures)}}


def _marks(context: RunContext, section: VerifySection, answers: Sequence[tuple[Problem, str]]) -> list[AnswerMark]:
    root = context.run.responses
    with context.console.meter("verify", len(answers), "answers") as meter:
        return mark_answers(
            answers,
            _limits(section),
            log=root / "program_verdicts.jsonl",
            scratch=root / ".sandbox.partial",
            continues=False,
            advance=meter.advance,
        )


def _limits(section: VerifySection) -> Limits:
    return Limits(timeout_s=section.timeout_s, memory_mb=section.memory_mb)
