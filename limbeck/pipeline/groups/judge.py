"""The group `judge`: how often another model prefers the student's greedy answers to somebody else's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from limbeck.client.keys import without_key
from limbeck.client.openai import Server
from limbeck.evaluation.judge.asking import AnswerPair, Judge, JudgeQuestion, estimate, questions_of
from limbeck.evaluation.judge.log import Judgement, JudgementLog, used
from limbeck.evaluation.judge.verdicts import (
    JudgedPair,
    printable_judgement,
    score_pairs,
    summarise_pairs,
    unread_warning,
)
from limbeck.pipeline.engine import RunContext
from limbeck.pipeline.evaluation_context import EvaluationContext, Group, GroupResult, Need
from limbeck.pipeline.groups.rouge import greedy
from limbeck.recipe.evaluation import EvaluateSection, JudgeSection
from limbeck.runtime.rundir import write_text
from limbeck.types import LimbeckError, Prompt

# The win rate's name by whose answers the student's are set beside.
_METRIC = {"teacher": "win_rate", "references": "win_rate_references", "before": "win_rate_before"}
# What FastChat's pairwise files call a verdict, in the order where model_1, the student, is A; and where it is B.
_WINNERS = ({"A": "model_1", "B": "model_2", "C": "tie"}, {"A": "model_2", "B": "model_1", "C": "tie"})


def _measure(evaluation: EvaluationContext) -> GroupResult:
    section, pairs = evaluation.section.judge, _pairs(evaluation)
    evaluation.release(student=False)
    server = _server(section)
    # A server is only needed while something is left to ask.
    model = section.model or server.model(None)
    asked = questions_of(pairs, model)
    # Beside the scores, not among them: those are set aside when another group is added, and this cost money.
    log = JudgementLog.open(evaluation.context.run.root / "judgements.jsonl")
    every = list({question.key: question for orders in asked for question in orders}.values())
    left = [question for question in every if not log.holds(question.key, section.max_new_tokens)]
    if left:
        judge = Judge(
            server=server,
            model=server.model(section.model),
            max_new_tokens=section.max_new_tokens,
            concurrency=section.concurrency,
        )
        _ask(evaluation, judge, log, left, known=len(every) - len(left))
    judged = [_judged(pair, orders, log, server) for pair, orders in zip(pairs, asked, strict=True)]
    rows = score_pairs(judged, _METRIC[section.against])
    if (warning := unread_warning(judged)) is not None:
        evaluation.context.console.warn(warning)
    judgements = [log.known[question.key] for question in every]
    _write_pairs(evaluation, model, [_masked(evaluation, pair) for pair in pairs], judged)
    own = sum(not judgement.greedy for judgement in judgements)
    detail = {"model": model, "against": section.against} | summarise_pairs(judged)
    return GroupResult(
        tables={"": rows}, detail=detail | {"used": used(judgements), "at_the_judges_own_temperature": own}
    )


def _pairs(evaluation: EvaluationContext) -> list[AnswerPair]:
    """What is set side by side: prompts that both answered."""
    against, sampling = evaluation.section.judge.against, greedy(evaluation.section)
    prompts = evaluation.prompts[: evaluation.section.prompts]
    if against == "before" and evaluation.context.run.manifest("student") is None:
        raise LimbeckError(
            "evaluate.judge.against is before, but nothing was trained here, so there is no student before it; set "
            "evaluate.judge.against=teacher or references"
        )
    if against == "references":
        others = _references(evaluation, prompts)
        prompts = [prompt for prompt in prompts if prompt.id in others]
        student = evaluation.texts("student", sampling, prompts)
    else:
        student = evaluation.texts("student", sampling)
        earlier = replace(evaluation, part="before")
        others = evaluation.texts("teacher", sampling) if against == "teacher" else earlier.texts("student", sampling)
    pairs = [
        AnswerPair(id=prompt.id, request=_request(prompt), student=student[prompt.id], other=others[prompt.id])
        for prompt in prompts
        if prompt.id in student and prompt.id in others
    ]
    if not pairs:
        raise LimbeckError(
            f"none of {len(prompts)} held-out prompts fits both models with {evaluation.section.max_new_tokens} tokens "
            "of answer, so the judge has nothing to compare; lower evaluate.max_new_tokens"
        )
    return pairs


def _references(evaluation: EvaluationContext, prompts: Sequence[Prompt]) -> dict[str, str]:
    """The reference answer of each prompt that has one, the first of several."""
    found = {prompt.id: prompt.known_answers[0].strip() for prompt in prompts if prompt.known_answers}
    lacking = len(prompts) - len(found)
    if not found:
        raise LimbeckError(
            f"evaluate.judge.against is references, but none of {len(prompts)} held-out prompts has one; give data "
            "with answers (prompts.fields names the field), or set evaluate.judge.against=teacher"
        )
    if lacking:
        evaluation.context.console.warn(
            f"judge: {lacking} of {len(prompts)} held-out prompts have no reference; left out"
        )
    return found


def _request(prompt: Prompt) -> str:
    """A prompt as the judge reads it: a conversation with its speakers, unless the user alone has spoken, once."""
    if prompt.text is not None:
        return prompt.text
    turns = prompt.messages or ()
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def _ask(
    evaluation: EvaluationContext, judge: Judge, log: JudgementLog, left: Sequence[JudgeQuestion], *, known: int
) -> None:
    """Judge what is left; each judgement is on disk before the next is counted."""
    context, section = evaluation.context, evaluation.section.judge
    guess = estimate(left, judge.max_new_tokens)
    price = _price(section, guess.input_tokens, guess.output_tokens)
    context.console.say(
        f"judge: {guess.requests} requests to {judge.model} ({known} judged earlier), about {guess.input_tokens:,} "
        f"tokens to read and at most {guess.output_tokens:,} to write{f', at most {price}' if price else ''}"
    )
    got: list[Judgement] = []
    with context.console.meter("judge", known + len(left), "judgements", known) as meter:
        for judgement in judge.ask(left, answered_before=log.has_verdict_of(judge.model)):
            with context.stop.deferred():
                log.add(judgement)
            got.append(judgement)
            meter.advance(1)
            context.stop.raise_if_requested()
    spent = used(got)
    price = _price(section, spent["prompt_tokens"], spent["completion_tokens"])
    uncounted = f"; the server did not count {spent['uncounted_replies']} replies" if spent["uncounted_replies"] else ""
    context.console.say(
        f"judge: {spent['prompt_tokens']:,} tokens read and {spent['completion_tokens']:,} written"
        f"{f', {price}' if price else ''}{uncounted}"
    )
    if not all(judgement.greedy for judgement in got):
        context.console.warn(f"{judge.model} takes no temperature, so it judges at its own and not greedily")


def _price(section: JudgeSection, input_tokens: int, output_tokens: int) -> str:
    """In the unit of evaluate.judge.price_per_million; empty without it."""
    if section.price_per_million is None:
        return ""
    into, out_of = section.price_per_million
    return f"{(input_tokens * into + output_tokens * out_of) / 1e6:.2f} at evaluate.judge.price_per_million"


def _judged(
    pair: AnswerPair, orders: tuple[JudgeQuestion, JudgeQuestion], log: JudgementLog, server: Server
) -> JudgedPair:
    heard = [printable_judgement(log.known[question.key].opinion) for question in orders]
    # Masked here as well: the record may be one that knew no mask.
    first, second = (replace(opinion, text=without_key(opinion.text, server.api_key_env)) for opinion in heard)
    return JudgedPair(id=pair.id, first=first, second=second, lengths=(len(pair.student), len(pair.other)))


def _masked(evaluation: EvaluationContext, pair: AnswerPair) -> AnswerPair:
    """A pair whose answers repeat no key: neither the judge's nor that of the teacher's server."""
    for section in (evaluation.section.judge, evaluation.context.recipe.responses.server):
        name = section.api_key_env if section else None
        pair = replace(pair, student=without_key(pair.student, name), other=without_key(pair.other, name))
    return pair


def _write_pairs(
    evaluation: EvaluationContext, model: str, pairs: Sequence[AnswerPair], judged: Sequence[JudgedPair]
) -> None:
    """The pairs with both judgements, in the fields of FastChat's pairwise judgements, whose tools read them."""
    lines = []
    for pair, verdicts in zip(pairs, judged, strict=True):
        line = {
            "question_id": pair.id,
            "model_1": "student",
            "model_2": evaluation.section.judge.against,
            "judge": [model],
        }
        for game, (opinion, winner) in enumerate(
            zip((verdicts.first, verdicts.second), _WINNERS, strict=True), start=1
        ):
            line[f"g{game}_winner"] = winner[opinion.verdict] if opinion.verdict else "error"
            line[f"g{game}_judgment"] = opinion.text
        line |= {"turn": 1, "prompt": pair.request, "answer_1": pair.student, "answer_2": pair.other}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(evaluation.folder / f"{evaluation.part}.judge.pairs.jsonl", "".join(lines))


def _server(section: JudgeSection) -> Server:
    assert section.base_url is not None
    return Server(
        base_url=section.base_url,
        timeout_s=section.timeout_s,
        retries=section.retries,
        api_key_env=section.api_key_env,
        section="evaluate.judge",
    )


def _check(context: RunContext) -> None:
    section = context.recipe.evaluate.judge
    if section.base_url is None:
        raise LimbeckError(
            "evaluate.groups names judge, but evaluate.judge.base_url is missing; give the address of an "
            "OpenAI-compatible server, such as http://localhost:8000/v1, or leave judge out of evaluate.groups"
        )
    server = _server(section)
    if not context.run.done("evaluation"):
        server.check_key()


def _needs(section: EvaluateSection) -> frozenset[Need]:
    # Not "references": some of a data set may lack theirs, and are left out.
    return frozenset({"teacher"} if section.judge.against == "teacher" else ())


GROUP = Group(name="judge", measure=_measure, parts=("after",), needs=_needs, check=_check)
