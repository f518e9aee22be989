"""Answers of a hosted teacher: what they cost is said before, counted meanwhile, and kept with the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.hosted_cost import cost_of, hosted_teachers, questions_of
from limbeck.pipeline.text_only import WrittenText, texts_as_responses
from limbeck.prompts.templates import TemplateName
from limbeck.runtime.files import write_json
from limbeck.runtime.records import read_object
from limbeck.student.endings import answer_ends
from limbeck.teachers.hosted import HostedTeacher
from limbeck.teachers.hosted_account import NOTHING, PaidReply, dollars
from limbeck.teachers.hosted_asking import HostedQuestion
from limbeck.teachers.hosted_options import OnApi
from limbeck.types import Json, LimbeckError, Response, Sampling, TokenPrompt


def check_hosted(context: RunContext) -> None:
    """Check that what a recipe asks of a hosted teacher can be asked, and paid.

    Raises:
        LimbeckError: it cannot; nothing has been asked.
    """
    hosted, recipe = hosted_teachers(context), context.recipe
    writes = recipe.base_author == "teacher" and recipe.responses.server is None
    scoring = any(one.where.top_logprobs for one in hosted.values())
    if scoring and (recipe.on_policy or not writes):
        raise LimbeckError(
            "teacher.where.top_logprobs are those of the service's own answers, and the responses are another's; set "
            "responses.source=teacher, or leave it out"
        )
    if not hosted or not writes:
        return
    responses, template = recipe.responses, recipe.prompts.template
    for what, given, remedy in (
        ("responses.top_k", responses.top_k, "set responses.top_k=0"),
        ("responses.stop", list(responses.stop), "leave responses.stop empty"),
    ):
        if given:
            raise LimbeckError(f"{what} is {given}, which a hosted teacher (teacher.where=api) does not keep; {remedy}")
    if template not in ("plain", "alpaca") and any(one.where.api == "completions" for one in hosted.values()):
        raise LimbeckError(
            f"teacher.where.api=completions continues a text, and prompts.template is {template}; set "
            "prompts.template=plain or alpaca, or teacher.where.api=chat"
        )
    for name, teacher in hosted.items():
        if teacher.where.top_logprobs:
            _check_logprobs(context, f"teachers.{name}" if name else "teacher", teacher.where)
    if context.wants("respond") and not context.run.done("respond"):
        for teacher in hosted.values():
            teacher.check_service()


def _check_logprobs(context: RunContext, key: str, where: OnApi) -> None:
    """Check that log-probabilities are asked for as services give them: of their own answers, at temperature 1.

    Raises:
        LimbeckError: they are not.
    """
    section, responses = context.recipe.teacher, context.recipe.responses
    for what, given, wanted in (
        ("teacher.support_k", section.support_k, where.top_logprobs),
        # Some services say them before these are applied, some after.
        ("responses.temperature", responses.temperature, 1),
        ("responses.top_p", responses.top_p, 1),
        (f"{key}.where.api", where.api, "chat"),
    ):
        if given != wanted:
            raise LimbeckError(
                f"{key}.where.top_logprobs={where.top_logprobs} gives so many tokens of each position of answers at "
                f"temperature 1, but {what} is {given}; set {what}={wanted}"
            )


def hosted_answers(
    context: RunContext,
    teacher: HostedTeacher,
    asked: Sequence[TokenPrompt],
    template: TemplateName,
    sampling: Sampling,
) -> tuple[list[Response], Json]:
    """The answers to `asked`, in order, and their record for the manifest. What was paid for before is not asked again.

    A prompt that the service does not answer has an empty response, which nothing is learnt from.
    """
    known = [context.known_prompts[prompt.id] for prompt in asked]
    questions = list(questions_of(context, teacher, known, template, sampling))
    _say_cost(context, teacher, questions)
    before = len(questions) - len(teacher.left(questions))
    replies: dict[int, PaidReply] = {}
    # Noted at once, so that it stands there whatever ends the run.
    with context.console.meter("respond", len(questions), "answers", before) as meter, context.stop.deferred() as ends:
        try:
            for place, reply in teacher.ask(questions, go_on=lambda: not ends()):
                replies[place] = reply
                if "tokens" in reply.content:
                    # Of the first one before the second is paid for.
                    teacher.scored(reply, questions[place].name)
                if len(replies) > before:
                    meter.advance(1, f"{dollars(teacher.account.spent)} of {dollars(_budget(teacher))}")
        finally:
            _note(context)
    context.stop.raise_if_requested()
    if teacher.where.top_logprobs:
        return _scored_responses(context, teacher, asked, replies, template, sampling)
    return _responses(context, asked, replies, template, sampling)


def _budget(teacher: HostedTeacher) -> Decimal:
    return teacher.account.budget or NOTHING


def _say_cost(context: RunContext, teacher: HostedTeacher, questions: Sequence[HostedQuestion]) -> None:
    """Say what is the most that the questions which are left can cost."""
    left, account = [questions[place] for place in teacher.left(questions)], teacher.account
    if not left:
        return
    cost = cost_of(teacher, left)
    spent = f"; {dollars(account.spent)} are spent" if account.spent else ""
    context.console.say(
        f"respond: {cost.answers} answers of {cost.model} ({len(questions) - len(left)} paid for earlier) cost "
        f"at most {dollars(cost.usd)}: {cost.prompt_bytes:,} bytes of prompts, no more than "
        f"{cost.answer_tokens:,} tokens of answers; the budget is {dollars(_budget(teacher))}{spent}"
    )
    if account.spent + cost.usd > _budget(teacher):
        context.console.warn(
            "the budget does not cover that: where it is used up, the run ends, and a higher teacher.where.budget_usd "
            "continues it"
        )


def _responses(
    context: RunContext,
    asked: Sequence[TokenPrompt],
    replies: Mapping[int, PaidReply],
    template: TemplateName,
    sampling: Sampling,
) -> tuple[list[Response], Json]:
    """The responses of all prompts; empty ones where there is no answer."""
    texts = {place: reply.content for place, reply in replies.items() if "text" in reply.content}
    written = [
        WrittenText(
            prompt=context.known_prompts[asked[place].id],
            text=kept["text"],
            cut=kept["finish"] == "length",
            sampling=sampling,
        )
        for place, kept in texts.items()
    ]
    found, record = texts_as_responses(context, written, context.teacher.tokenizer, template)
    by_place = dict(zip(texts, found, strict=True))
    responses = [by_place.get(place) or _empty(prompt, sampling) for place, prompt in enumerate(asked)]
    return responses, record | _unanswered(context, replies)


def _unanswered(context: RunContext, replies: Mapping[int, PaidReply]) -> Json:
    none = [reply.content["none"] for reply in replies.values() if "none" in reply.content]
    if none:
        context.console.warn(f"{len(none)} of {len(replies)} prompts have no answer and are left out ({none[0]}, ...)")
    return {"unanswered": len(none)}


def _scored_responses(
    context: RunContext,
    teacher: HostedTeacher,
    asked: Sequence[TokenPrompt],
    replies: Mapping[int, PaidReply],
    template: TemplateName,
    sampling: Sampling,
) -> tuple[list[Response], Json]:
    """The responses of all prompts by the tokens that the service drew, whose ends it says nothing of."""
    tokenizer = context.teacher.tokenizer
    ends = answer_ends(context.teacher.skeleton, tokenizer, template, context.recipe.prompts.chat_options)
    # Where the chat template ends its turns with a token of its own, that one ends an answer.
    end = next((token for token in ends if token != tokenizer.eos_token_id), ends[0])
    responses = []
    for place, prompt in enumerate(asked):
        kept = replies[place].content
        ids = teacher.scored(replies[place], prompt.label).ids if kept.get("tokens") else ()
        response = replace(_empty(prompt, sampling), response_ids=ids)
        if ids and kept["finish"] == "stop":
            known = ids[-1] in ends
            response = replace(response, response_ids=ids if known else (*ids, end), stop="eos")
            # No distribution is known of an end that the service left out, so that it is not in the loss.
            response = response if known else replace(response, spans=((0, len(ids)),))
        responses.append(response)
    return responses, {"ends_without_signal": sum(bool(r.spans) for r in responses)} | _unanswered(context, replies)


def _empty(prompt: TokenPrompt, sampling: Sampling) -> Response:
    return Response(
        prompt_id=prompt.id,
        author="teacher",
        prompt_ids=prompt.ids,
        response_ids=(),
        stop="length",
        sampling=sampling,
        split=prompt.split,
    )


def _note(context: RunContext) -> None:
    """Write what was paid so far into provenance.json."""
    path = context.run.root / "provenance.json"
    known = read_object(path) if path.exists() else {}
    write_json(path, known | paid_record(context))


def paid_record(context: RunContext) -> Json:
    """What hosted teachers were paid in this run, for records; nothing where there are none."""
    hosted = [one for one in hosted_teachers(context).values() if one.paid is not None and one.paid.exists()]
    return {"paid": {one.service_model: one.account.record() for one in hosted}} if hosted else {}
