"""Answers to one prompt, compared by a judge behind a server, each with each and in both orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, Protocol

from limbeck.client.openai import Server, ServerOptions
from limbeck.evaluation.judge.asking import Judge
from limbeck.evaluation.judge.log import JudgementLog
from limbeck.evaluation.judge.questions import AnswerPair, estimate, questions_of
from limbeck.evaluation.judge.verdicts import JudgedPair
from limbeck.pipeline.context import RunContext


class JudgeOptions(ServerOptions, Protocol):
    """Options of a judge, wherever a recipe holds them."""

    @property
    def base_url(self) -> str | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def verdict(self) -> Literal["text", "logprobs"]: ...
    @property
    def judgement_tokens(self) -> int: ...
    @property
    def concurrency(self) -> int: ...


def judge_server(judge: JudgeOptions, section: str) -> Server:
    """Where a judge is.

    Args:
        section: of the recipe, whose keys messages name.
    """
    assert judge.base_url is not None
    return Server.at(judge.base_url, judge, section)


def require_judge(judge: JudgeOptions, section: str) -> None:
    """Check that a judge is there, and that it can be read as it is to be.

    Raises:
        LimbeckError: it is down, has another model, or gives no log-probabilities where they are read.
    """
    server = judge_server(judge, section).hurried
    model = server.model(judge.model)
    if judge.verdict == "logprobs":
        _asking(judge, server, model).require_logprobs()


def shares_won(
    context: RunContext,
    judge: JudgeOptions,
    server: Server,
    answers: Mapping[str, Sequence[tuple[str, str]]],
    requests: Mapping[str, str],
    *,
    stage: str,
) -> dict[str, float | None]:
    """Share of its comparisons that each answer wins, ties half; None where one was unread.

    Where the judge is read by log-probabilities, its mean probability of being the better one.

    Judgements are kept in judgements.jsonl of the run, which outlives its stages: no question is asked twice.

    Args:
        answers: name and text of the answers to each prompt, by its id.
        requests: what each prompt asks.
        stage: name of the stage, for the console.
    """
    compared = [(prompt, *both) for prompt, given in answers.items() for both in combinations(given, 2)]
    pairs = [
        AnswerPair(id=f"{first}-{second}", request=requests[prompt], student=text, other=other)
        for prompt, (first, text), (second, other) in compared
    ]
    asked = questions_of(pairs, judge.model or server.model(None), judge.verdict)
    log = JudgementLog.open(context.run.root / "judgements.jsonl")
    every = list({question.key: question for orders in asked for question in orders}.values())
    left = [question for question in every if not log.holds(question.key, judge.judgement_tokens)]
    if left:
        asking = _asking(judge, server, server.model(judge.model))
        guess = estimate(left, judge.judgement_tokens)
        context.console.say(
            f"{stage}: {guess.requests} requests to the judge {asking.model} ({len(every) - len(left)} judged "
            f"earlier), about {guess.input_tokens:,} tokens to read and at most {guess.output_tokens:,} to write"
        )
        with context.console.meter(f"{stage}: judge", len(every), "judgements", len(every) - len(left)) as meter:
            for judgement in asking.ask(left, answered_before=log.has_verdict_of(asking.model)):
                with context.stop.deferred():
                    log.add(judgement)
                meter.advance(1)
                context.stop.raise_if_requested()
    won: dict[str, list[float | None]] = {name: [] for given in answers.values() for name, _ in given}
    for (_, (first, _), (second, _)), pair, (one, other) in zip(compared, pairs, asked, strict=True):
        value = _value(pair, log.known[one.key].opinion, log.known[other.key].opinion)
        won[first].append(value)
        won[second].append(None if value is None else 1.0 - value)
    return {name: _mean(values) for name, values in won.items()}


def _asking(judge: JudgeOptions, server: Server, model: str) -> Judge:
    return Judge(server=server, model=model, max_new_tokens=judge.judgement_tokens, concurrency=judge.concurrency)


def _value(pair: AnswerPair, first: Any, second: Any) -> float | None:
    """What a comparison counts for the first of its answers."""
    lengths = (len(pair.student), len(pair.other))
    return JudgedPair(id=pair.id, first=first, second=second, lengths=lengths).value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
