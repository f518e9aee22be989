"""Answers of the teacher that are checked before the student learns from them (`responses.verify`)."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from limbeck.evaluation.context import response_text, text_behind
from limbeck.evaluation.judge.questions import request_text
from limbeck.evaluation.sandbox.host import Limits, require_sandbox
from limbeck.evaluation.tasks.marking import mark_answers
from limbeck.evaluation.tasks.math_answers import extract
from limbeck.evaluation.tasks.problems import CODE, Problem
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.judged_answers import judge_server, require_judge, shares_won
from limbeck.pipeline.problems import read_prompt_problems
from limbeck.prompts.labels import prompt_label
from limbeck.recipe.keys import fingerprinted
from limbeck.recipe.responses import VerifySection
from limbeck.rollouts.asked import ids_of, with_ids
from limbeck.types import Json, LimbeckError, Response, Sampling, TokenPrompt

VERIFY_KEY = "responses.verify"
JUDGE_KEY = f"{VERIFY_KEY}.judge"
# Answers whose texts are in memory at once.
MARKED_AT_A_TIME = 4096
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
) -> tuple[Iterable[Response], Json]:
    """The responses with a right one, or the best, for each training prompt that got one, and what the manifest says.

    Held-out responses stay as they are: how far the student is from the teacher is measured on what the teacher writes.

    Args:
        responses: the first answers. Those on disk stay there until one is asked for, those of later attempts too.
        write_again: answers some prompts once more, given the number of the attempt from 1.

    Raises:
        LimbeckError: no training prompt got a right answer.
    """
    section = context.recipe.responses.verify
    assert section is not None
    places = {r.prompt_id: place for place, r in enumerate(responses) if r.split == "train"}
    first, waiting = _Attempt(answers=responses, places=places), with_ids(asked, places.__contains__)
    choose = _best if section.by == "judge" else _right
    found = choose(context, section, waiting, first, tokenizer, write_again)
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
    record: Json = {"prompts": prompts, "right": len(chosen), "left_out": left_out, "by_attempt": found.by_attempt}
    record |= {} if section.by == "task" else {"by": section.by}
    kept = _kept(responses, found, drops=bool(left_out))
    return kept, {"verified": record | {"failures": dict(found.failures)}}


def _kept(responses: Sequence[Response], found: _Chosen, *, drops: bool) -> Iterator[Response]:
    """The first answers, each with the chosen one in its place; of training prompts without one by whether it drops."""
    for response in responses:
        if response.split == "train" and response.prompt_id in found.chosen:
            yield found.attempts[found.chosen[response.prompt_id]].of(response.prompt_id)
        elif response.split != "train" or not drops:
            yield response


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
class _Attempt:
    """The answers of an attempt.

    Attributes:
        places: of the answer to each prompt among them.
    """

    answers: Sequence[Response]
    places: Mapping[str, int]

    def of(self, prompt: str) -> Response:
        """The answer to a prompt."""
        return self.answers[self.places[prompt]]


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Chosen answers.

    Attributes:
        chosen: the number of the attempt for each prompt that got one.
        by_attempt: how many of each attempt.
        failures: why others were not.
    """

    attempts: Sequence[_Attempt]
    chosen: Mapping[str, int]
    by_attempt: list[int]
    failures: Counter[str]


def _again(asked: Sequence[TokenPrompt], attempt: int, write_again: WriteAgain) -> _Attempt:
    """A later attempt at some prompts."""
    answers = write_again(asked, attempt)
    return _Attempt(answers=answers, places={response.prompt_id: place for place, response in enumerate(answers)})


def _right(
    context: RunContext,
    section: VerifySection,
    asked: Sequence[TokenPrompt],
    first: _Attempt,
    tokenizer: Any,
    write_again: WriteAgain,
) -> _Chosen:
    """The first right answer to each prompt; the next one is only written where none before was."""
    by_task = section.by == "task"
    problems = read_prompt_problems(context.run.problems) if by_task else _math_problems(context, section, asked)
    waiting, attempts, by_attempt, failures = asked, [first], list[int](), Counter[str]()
    chosen: dict[str, int] = {}
    for number in range(section.samples):
        if number:
            attempts.append(_again(waiting, number, write_again))
        names = list(ids_of(waiting))
        texts = ((problems[name], text_behind(attempts[number].of(name), tokenizer)) for name in names)
        marks = _marks(context, section, texts, len(names))
        right = [name for name, failure in zip(names, marks, strict=True) if failure is None]
        failures.update(failure for failure in marks if failure is not None)
        chosen |= dict.fromkeys(right, number)
        by_attempt.append(len(right))
        waiting = with_ids(waiting, frozenset(names).difference(right).__contains__)
        if not len(waiting):
            break
    return _Chosen(attempts=attempts, chosen=chosen, by_attempt=by_attempt, failures=failures)


def _best(
    context: RunContext,
    section: VerifySection,
    asked: Sequence[TokenPrompt],
    first: _Attempt,
    tokenizer: Any,
    write_again: WriteAgain,
) -> _Chosen:
    """The answer to each prompt that wins most of its comparisons, the first of several; all of them are written.

    Answers that say the same are one; where all do there is nothing to choose, and it is taken.
    """
    judge = section.judge
    assert judge is not None, "the recipe's checks ask for it"
    attempts = [first, *(_again(asked, number, write_again) for number in range(1, section.samples))]
    candidates: dict[str, dict[str, int]] = {}
    for prompt in ids_of(asked):
        texts = [response_text(one.of(prompt), tokenizer).strip() for one in attempts]
        candidates[prompt] = {text: number for number, text in reversed(list(enumerate(texts))) if text}
    named = {
        prompt: [(f"{prompt}-{number}", text) for text, number in sorted(texts.items(), key=lambda one: one[1])]
        for prompt, texts in candidates.items()
    }
    server = judge_server(judge, JUDGE_KEY)
    requests = {prompt: request_text(context.known_prompts[prompt]) for prompt in named}
    won = shares_won(context, judge, server, named, requests, stage="respond")
    chosen, failures = dict[str, int](), Counter[str]()
    for prompt, texts in candidates.items():
        shares = {number: won[f"{prompt}-{number}"] for number in sorted(texts.values())}
        known = {number: share for number, share in shares.items() if share is not None}
        if not known and len(texts) != 1:
            failures["no answer" if not texts else "no verdict"] += 1
            continue
        chosen[prompt] = max(known, key=lambda number: known[number]) if known else next(iter(texts.values()))
    taken = Counter(chosen.values())
    by_attempt = [taken[number] for number in range(section.samples)]
    return _Chosen(attempts=attempts, chosen=chosen, by_attempt=by_attempt, failures=failures)


def _marks(
    context: RunContext, section: VerifySection, answers: Iterable[tuple[Problem, str]], count: int
) -> list[str | None]:
    """Why each of so many answers is not right; None where it is. Few of them are in memory at a time."""
    root, left, found = context.run.responses, iter(answers), list[str | None]()
    with context.console.meter("verify", count, "answers") as meter:
        while some := list(islice(left, MARKED_AT_A_TIME)):
            marks = mark_answers(
                some,
                _limits(section),
                log=root / "program_verdicts.jsonl",
                scratch=root / ".sandbox.partial",
                continues=False,
                advance=meter.advance,
            )
            found += [mark.failure for mark in marks]
    return found


def _limits(section: VerifySection) -> Limits:
    return Limits(timeout_s=section.timeout_s, memory_mb=section.memory_mb)
