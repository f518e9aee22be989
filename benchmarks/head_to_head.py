"""Arms of a sweep beside each other, answer by answer, by a judge that is read by its letters; prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.client.openai import Server
from limbeck.compare.runs import Comparison
from limbeck.compare.uncertainty import Estimate, Resampled, ResampledMetric, draws
from limbeck.evaluation.context import response_text
from limbeck.evaluation.judge.asking import Judge
from limbeck.evaluation.judge.log import JudgementLog
from limbeck.evaluation.judge.questions import AnswerPair, JudgeQuestion, estimate, questions_of, request_text
from limbeck.evaluation.judge.verdicts import JudgedPair
from limbeck.evaluation.scores.bootstrap import RESAMPLES
from limbeck.models.loading import load_tokenizer
from limbeck.prompts.io import read_prompts
from limbeck.rollouts.io import read_responses
from limbeck.runtime.console import Console
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import LimbeckError

# Beside the sweep's own files, so that the same command asks nothing twice.
JUDGEMENTS = "judgements.jsonl"
# What a small judge on a processor may take for a long pair.
TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class RunAnswers:
    """The greedy held-out answers of a run, and what was asked, by prompt id."""

    answers: Mapping[str, str]
    requests: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Two arms beside each other, by seed.

    Attributes:
        won: how far each prompt's answer of the first arm is the better one, equal answers half; None: unread.
        judged: the pairs of different answers.
    """

    first: str
    second: str
    won: Mapping[int, Mapping[str, float | None]]
    judged: Sequence[JudgedPair]


def over_prompts_and_seeds(wins: Mapping[int, Sequence[float]]) -> Estimate:
    """The mean of rows of wins by seed, with the interval that a comparison gives an arm."""
    won_RE = np.array(list(wins.values()))
    examples = won_RE.shape[1]
    counts_BE = draws(examples, RESAMPLES, f"{examples} examples")
    sheet = ResampledMetric(
        arm_R=(0,) * len(wins),
        seed_R=tuple(wins),
        value_R=won_RE.mean(1),
        drawn_BR=counts_BE @ won_RE.T / examples,
        examples=examples,
        pivotal=False,
        share=True,
    )
    return Resampled(sheet=sheet).estimate(0)


def win_rate_cells(wins: Mapping[int, Sequence[float]]) -> str:
    """Win rates by seed, their mean and its interval, as cells of a Markdown table."""
    found = over_prompts_and_seeds(wins)
    shown = ", ".join(f"{sum(won) / len(won):.3f}" for won in wins.values())
    spread = "" if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
    return f"{shown} | {found.mean:.3f} | {spread}"


def answers_of(directory: Path) -> RunAnswers:
    """The greedy answers that the evaluation after all training has left in a run directory.

    Raises:
        LimbeckError: it has left none.
    """
    run = RunDirectory(directory)
    files = sorted((run.scores / "answers").glob("after-*.jsonl"))
    greedy = [
        response
        for path in files
        for response in read_responses(path)
        if response.sampling is not None and response.sampling.temperature == 0.0
    ]
    if not greedy:
        raise LimbeckError(
            f"{directory} holds no greedy answers in scores/answers (after-*.jsonl), expected those of its evaluation; "
            f"delete {directory / 'stages' / 'evaluate.json'} and {run.scores}, and run the same command again"
        )
    tokenizer: Any = load_tokenizer(str(run.finished_student))
    asked = {prompt.id: request_text(prompt) for prompt in read_prompts(run.prompts) if prompt.split == "heldout"}
    answers = {response.prompt_id: response_text(response, tokenizer) for response in greedy}
    return RunAnswers(answers={name: text for name, text in answers.items() if name in asked}, requests=asked)


def judged_arms(
    comparison: Comparison, names: Sequence[str], judge: Judge, record: Path, console: Console
) -> list[Beside]:
    """Each two of some arms beside each other, on the prompts and seeds that both have.

    Args:
        record: file of judgements; what is there is not asked again.
    """
    runs = {
        name: {
            member.seed: answers_of(member.run.directory)
            for arm in comparison.arms
            if arm.name == name
            for member in arm.done
            if member.run is not None
        }
        for name in names
    }
    pairs = {
        (first, second, seed, prompt): AnswerPair(
            id=f"{first}:{second}:{seed}:{prompt}",
            request=own.requests[prompt],
            student=text,
            other=runs[second][seed].answers[prompt],
        )
        for second, first in combinations(names, 2)
        for seed, own in runs[first].items()
        if seed in runs[second]
        for prompt, text in own.answers.items()
        if prompt in runs[second][seed].answers
    }
    log = _asked(judge, [pair for pair in pairs.values() if pair.student != pair.other], record, console)
    found = {place: _judged(pair, judge.model, log) for place, pair in pairs.items() if pair.student != pair.other}
    sides = []
    for second, first in combinations(names, 2):
        won: dict[int, dict[str, float | None]] = {}
        for place in pairs:
            if place[:2] == (first, second):
                won.setdefault(place[2], {})[place[3]] = found[place].value if place in found else 0.5
        own = [pair for place, pair in found.items() if place[:2] == (first, second)]
        sides.append(Beside(first=first, second=second, won=won, judged=own))
    return sides


def _asked(judge: Judge, pairs: Sequence[AnswerPair], record: Path, console: Console) -> JudgementLog:
    """The record after everything that it lacks was asked; each judgement is on disk before the next one counts."""
    log = JudgementLog.open(record)
    every: dict[str, JudgeQuestion] = {q.key: q for both in questions_of(pairs, judge.model, "logprobs") for q in both}
    left = [question for question in every.values() if not log.holds(question.key, judge.max_new_tokens)]
    if left:
        judge.require_logprobs()
        guess = estimate(left, judge.max_new_tokens)
        known = len(every) - len(left)
        console.say(
            f"judge: {len(left)} requests to {judge.model} ({known} judged earlier), {guess.input_tokens:,} tokens"
        )
        with console.meter("judge", len(every), "judgements", known) as meter:
            for judgement in judge.ask(left, answered_before=log.has_verdict_of(judge.model)):
                log.add(judgement)
                meter.advance(1)
    return log


def _judged(pair: AnswerPair, model: str, log: JudgementLog) -> JudgedPair:
    ((one, two),) = questions_of([pair], model, "logprobs")
    first, second = log.known[one.key].opinion, log.known[two.key].opinion
    return JudgedPair(id=pair.id, first=first, second=second, lengths=(len(pair.student), len(pair.other)))


def judge_section(sides: Sequence[Beside], model: str) -> list[str]:
    """The section of a page, as lines of Markdown."""
    opinions = [opinion for side in sides for pair in side.judged for opinion in (pair.first, pair.second)]
    places = [leaning for opinion in opinions if (leaning := opinion.leaning) is not None]
    lines = [
        "## Beside each other, by a judge",
        "",
        f"The judge `{model}` is shown the greedy held-out answers of two starts after DPO, of the same prompt and",
        "seed, in both orders, and read by the log-probabilities of its letter: a win rate is the mean probability",
        "that the first start's answer is better; equal answers count half and are not asked about. A prompt with an",
        "unread verdict of any seed is left out of its row. Orders agree: share of pairs where the likelier letter is",
        "for the same answer in both orders. Leaning: share of pairs whose mean over both orders is above one half,",
        "equal answers half.",
    ]
    if places:
        lines.append(
            f"The answer that stands first has a mean probability of {sum(places) / len(places):.3f} (0.5: no leaning "
            "to a place)."
        )
    lines += [
        "",
        "| starts | win rates by seed | mean | interval | leaning | pairs | equal | unread | orders agree |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    return [*lines, *(_row(side) for side in sides)]


def _row(side: Beside) -> str:
    every = {prompt for won in side.won.values() for prompt in won}
    read = sorted(p for p in every if all(won.get(p) is not None for won in side.won.values()))
    wins = {seed: [won[prompt] or 0.0 for prompt in read] for seed, won in side.won.items()}
    cells = win_rate_cells(wins) if read else "|  |"
    pairs = sum(len(won) for won in side.won.values())
    orders = [pair.for_student for pair in side.judged if pair.for_student is not None]
    agree = f"{sum(one == other for one, other in orders) / len(orders):.3f}" if orders else ""
    unread = f"{(len(side.judged) - len(orders)) / pairs:.3f}" if pairs else ""
    equal = f"{(pairs - len(side.judged)) / pairs:.3f}" if pairs else ""
    leans = [lean for pair in side.judged if (lean := pair.leans) is not None]
    halves = 0.5 * (pairs - len(side.judged))
    leaning = f"{(sum(leans) + halves) / (len(leans) + 2 * halves):.3f}" if leans else ""
    return f"| {side.first} over {side.second} | {cells} | {leaning} | {pairs} | {equal} | {unread} | {agree} |"


def judge_at(base_url: str, model: str | None) -> Judge:
    """The judge at an address, by its name there or as the only model it offers."""
    server = Server(base_url=base_url, timeout_s=TIMEOUT_S, section="judge")
    return Judge(server=server, model=server.model(model), max_new_tokens=1, concurrency=4)
