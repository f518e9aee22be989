"""Answers of the teacher that are checked before the student learns from them (`responses.verify`)."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.evaluation.context import response_text, text_behind
from limbeck.evaluation.judge.questions import request_text
from limbeck.evaluation.sandbox.host import Limits, require_sandbox
from limbeck.evaluation.tasks.marking import AnswerMark, mark_answers
from limbeck.evaluation.tasks.math_answers import extract
from limbeck.evaluation.tasks.problems import CODE, Problem
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.judged_answers import judge_server, require_judge, shares_won
from limbeck.pipeline.problems import read_prompt_problems
from limbeck.prompts.labels import prompt_label
from limbeck.recipe.keys import fingerprinted
from limbeck.recipe.responses import VerifySection
from limbeck.types import Json, LimbeckError, Response, Sampling, TokenPrompt

VERIFY_KEY = "responses.verify"
JUDGE_KEY = f"{VERIFY_KEY}.judge"
WriteAgain = Callable[[Sequence[TokenPrompt], int], Sequence[Response]]


def check_verification(context: RunContext) -> None:
    """Check that programs can be run here, where answers are programs, and that a judge is there.

    Raises:
        LimbeckError: this machine has no sandbox, or the judge is down or has another model.
    """
    section = context.recipe.responses.verify
    if section is None or context.run.done("respond"):
        return
    if section.judge is not None and context.wants("respond"):
        require_judge(section.judge, JUDGE_KEY)
    if section.by != "task" or context.recipe.prompts.problems_of not in CODE:
        return
    with tempfile.TemporaryDirectory() as scratch:
        without = f"leave {VERIFY_KEY} out, and learn from programs that were not run"
        require_sandbox(Path(scratch), _limits(section), section=VERIFY_KEY, otherwise=without)


def later_sampling(sampling: Sampling, attempt: int) -> Sampling:
    """How the answers of a later attempt are drawn: by a seed of their own."""
    return replace(sampling, seed=sampling.seed + attempt)


def verification_inputs(section: VerifySection) -> Json:
    """How answers are checked, for fingerprints; what is as it always was is left out."""
    found = fingerprinted(section)
    plain = {"by": "task", "column": None, "judge": None}
    return {key: value for key, value in found.items() if key not in plain or value != plain[key]}


def check_references(context: RunContext, asked: Sequence[TokenPrompt]) -> None:
    """Check that every training prompt has the reference answer that its answers are checked against.

    Raises:
        LimbeckError: one has none; names it and its place in the data.
    """
    section = context.recipe.responses.verify
    if section is not None and section.by == "math":
        _math_problems(context, section, asked)


def _math_problems(context: RunContext, section: VerifySection, asked: Sequence[TokenPrompt]) -> dict[str, Problem]:
    """The training prompts as mathematical problems, by id."""
    problems = {}
    for prompt in (context.known_prompts[one.id] for one in asked if one.split == "train"):
        given = prompt.completion if section.column is None else prompt.columns[section.column]
        found = extract(given or "")
        # A box with nothing in it is no answer in words.
        answer = found.answer or ("" if found.where == "boxed" else (given or "").strip())
        if not answer:
            where = "no reference answer" if section.column is None else f"nothing in the column {section.column!r}"
            raise LimbeckError(
                f"prompt {prompt_label(prompt)} has {where}, which responses.verify.by=math checks against; give one, "
                "name its column with responses.verify.column, or leave the row out"
            )
        problems[prompt.id] = Problem(id=prompt.id, task="math", request="", plain="", answer=answer)
    return problems


def verified(
    context: RunContext,
    responses: Sequence[Response],
    asked: Sequence[TokenPrompt],
    tokenizer: Any,
    write_again: WriteAgain,
) -> tuple[list[Response], Json]:
    """The responses with a right one, or the best, for each training prompt that got one, and what the manifest says.

    Held-out responses stay as they are: how far the student is from the teacher is measured on what the teacher writes.

    Args:
        responses: the first answers.
        write_again: answers some prompts once more, given the number of the attempt from 1.

    Raises:
        LimbeckError: no training prompt got a right answer.
    """
    section = context.recipe.responses.verify
    assert section is not None
    answers = {r.prompt_id: r for r in responses if r.split == "train"}
    waiting = [prompt for prompt in asked if prompt.id in answers]
    choose = _best if section.by == "judge" else _right
    found = choose(context, section, waiting, answers, tokenizer, write_again)
    chosen, prompts = found.chosen, len(waiting)
    if prompts and not chosen and section.unverified == "drop":
        raise LimbeckError(
            f"{VERIFY_KEY}: none of {prompts} training prompts got a right answer in {section.samples}, such as "
            f"{prompt_label(context.known_prompts[waiting[0].id])} (failures: {dict(found.failures)}); "
            f"{_more_for(context, found.failures)}, set {VERIFY_KEY}.unverified=keep, or choose a better teacher"
        )
    without = prompts - len(chosen)
    left_out = without if section.unverified == "drop" else 0
    context.console.say(
        f"respond: {len(chosen)} of {prompts} training prompts have {WORDS[section.by]}"
        + (f", {left_out} are left out" if left_out else "")
        + (f", {without} keep their first one" if without and not left_out else "")
    )
    kept = [
        chosen.get(r.prompt_id, r) for r in responses if r.split != "train" or r.prompt_id in chosen or not left_out
    ]
    record: Json = {"prompts": prompts, "right": len(chosen), "left_out": left_out, "by_attempt": found.by_attempt}
    record |= {} if section.by == "task" else {"by": section.by}
    return kept, {"verified": record | {"failures": dict(found.failures)}}


def _more_for(context: RunContext, failures: Counter[str]) -> str:
    """What to give more of, by the reason why most answers failed."""
    programs = context.recipe.prompts.problems_of in CODE
    limits = {"timeout": "timeout_s", "memory": "memory_mb"} if programs else {}
    (reason, _), *_ = failures.most_common(1) or [("wrong", 0)]
    if reason == "no verdict":
        return f"take a judge that gives its verdict as it is asked to ({JUDGE_KEY}.model)"
    return f"raise {VERIFY_KEY}.{limits.get(reason, 'samples')}"


# What a chosen answer is called.
WORDS = {"task": "a right answer", "math": "a right answer", "judge": "an answer that the judge chose"}


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Chosen answers by prompt, how many of each attempt, and why others were not."""

    chosen: dict[str, Response]
    by_attempt: list[int]
    failures: Counter[str]


def _right(
    context: RunContext,
    section: VerifySection,
    asked: Sequence[TokenPrompt],
    answers: dict[str, Response],
    tokenizer: Any,
    write_again: WriteAgain,
) -> _Chosen:
    """The first right answer to each prompt; the next one is only written where none before was."""
    by_task = section.by == "task"
    problems = read_prompt_problems(context.run.problems) if by_task else _math_problems(context, section, asked)
    waiting, chosen, by_attempt, failures = list(asked), dict[str, Response](), list[int](), Counter[str]()
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
    return _Chosen(chosen=chosen, by_attempt=by_attempt, failures=failures)


def _best(
    context: RunContext,
    section: VerifySection,
    asked: Sequence[TokenPrompt],
    answers: dict[str, Response],
    tokenizer: Any,
    write_again: WriteAgain,
) -> _Chosen:
    """The answer to each prompt that wins most of its comparisons, the first of several; all of them are written.

    Answers that say the same are one; where all do there is nothing to choose, and it is taken.
    """
    judge = section.judge
    assert judge is not None, "the recipe's checks ask for it"
    attempts = [answers]
    attempts += [{r.prompt_id: r for r in write_again(asked, attempt)} for attempt in range(1, section.samples)]
    candidates: dict[str, dict[str, int]] = {}
    for prompt in asked:
        texts = [response_text(one[prompt.id], tokenizer).strip() for one in attempts]
        candidates[prompt.id] = {text: number for number, text in reversed(list(enumerate(texts))) if text}
    named = {
        prompt: [(f"{prompt}-{number}", text) for text, number in sorted(texts.items(), key=lambda one: one[1])]
        for prompt, texts in candidates.items()
    }
    server = judge_server(judge, JUDGE_KEY)
    requests = {prompt: request_text(context.known_prompts[prompt]) for prompt in named}
    won = shares_won(context, judge, server, named, requests, stage="respond")
    chosen, numbers, failures = dict[str, Response](), list[int](), Counter[str]()
    for prompt, texts in candidates.items():
        shares = {number: won[f"{prompt}-{number}"] for number in sorted(texts.values())}
        known = {number: share for number, share in shares.items() if share is not None}
        if not known and len(texts) != 1:
            failures["no answer" if not texts else "no verdict"] += 1
            continue
        best = max(known, key=lambda number: known[number]) if known else next(iter(texts.values()))
        chosen[prompt] = attempts[best][prompt]
        numbers.append(best)
    return _Chosen(chosen=chosen, by_attempt=[numbers.count(n) for n in range(section.samples)], failures=failures)


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
