"""The questions of a run to its hosted teachers, and the most that their answers can cost, before any is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.verified_responses import later_sampling
from limbeck.prompts.chat import beyond_text, sent_turns
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.templates import TemplateName
from limbeck.prompts.wording import alpaca_text, plain_text
from limbeck.sampling.decoding import row_seed
from limbeck.teachers.base import Teacher
from limbeck.teachers.hosted import HostedTeacher
from limbeck.teachers.hosted_account import NOTHING
from limbeck.teachers.hosted_asking import HostedQuestion
from limbeck.types import LimbeckError, Prompt, Sampling

# The largest seed that all services take.
_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class HostedCost:
    """The most that some answers of a hosted teacher can cost.

    Attributes:
        model: the service's name of it.
        answers: their number.
        prompt_bytes: of all prompts; no tokenizer makes more tokens of them.
        answer_tokens: of all answers, at most.
        usd: dollars, with what the service may add to each prompt.
        budget: dollars that the recipe allows; None where it names none.
    """

    model: str
    answers: int
    prompt_bytes: int
    answer_tokens: int
    usd: Decimal
    budget: Decimal | None


def hosted_teachers(context: RunContext) -> Mapping[str, HostedTeacher]:
    """The hosted ones among the teachers of a run, by name; of one alone the name is empty."""
    every: Mapping[str, Teacher] = context.run_teachers or {"": context.run_teacher}
    return {name: found for name, teacher in every.items() if isinstance(found := teacher.scorer, HostedTeacher)}


def hosted_costs(context: RunContext, prompts: Sequence[Prompt]) -> dict[str, HostedCost]:
    """The most that a recipe's answers to some prompts can cost, by the name of the hosted teacher; of one alone it is
    empty. Nothing is asked, and answers that the run has paid for already are left out.

    With `responses.verify` each training prompt counts with all of its attempts.

    Raises:
        LimbeckError: a price is missing, or a prompt that a hosted teacher cannot be asked about.
    """
    recipe = context.recipe
    if recipe.base_author != "teacher" or recipe.responses.server is not None:
        return {}
    found, names = {}, tuple(recipe.teachers)
    attempts = 1 if recipe.responses.verify is None else recipe.responses.verify.samples
    template: TemplateName = "alpaca" if recipe.prompts.template == "alpaca" else "plain"
    for name, teacher in hosted_teachers(context).items():
        own = [p for p in prompts if recipe.routing is None or recipe.routing.member_of(p, names) == name]
        questions: list[HostedQuestion] = []
        for attempt in range(attempts):
            asked = [prompt for prompt in own if not attempt or prompt.split == "train"]
            sampling = later_sampling(sampling_of(recipe.responses), attempt)
            questions += questions_of(context, teacher, asked, template, sampling)
        found[name] = cost_of(teacher, [questions[place] for place in teacher.left(questions)])
    return found


def cost_of(teacher: HostedTeacher, questions: Sequence[HostedQuestion]) -> HostedCost:
    """The most that the answers to some questions can cost.

    Raises:
        LimbeckError: the recipe names no price.
    """
    budget = teacher.where.budget_usd
    teacher.price(0, 0)
    return HostedCost(
        model=teacher.service_model,
        answers=len(questions),
        prompt_bytes=sum(one.most_input_tokens for one in questions),
        answer_tokens=sum(one.sampling.max_new_tokens for one in questions),
        usd=sum((teacher.most(one) for one in questions), NOTHING),
        budget=None if budget is None else Decimal(str(budget)),
    )


def questions_of(
    context: RunContext,
    teacher: HostedTeacher,
    prompts: Sequence[Prompt],
    template: TemplateName,
    sampling: Sampling,
) -> Iterator[HostedQuestion]:
    """What a hosted teacher is asked, one question for each prompt.

    Raises:
        LimbeckError: a prompt that it cannot be asked about.
    """
    for prompt in prompts if context.seen is None else context.seen.prompts(prompts):
        if what := "images" if prompt.images else beyond_text(prompt):
            raise LimbeckError(
                f"prompt {prompt_label(prompt)} has {what}, which a hosted teacher is not asked about; leave it out, "
                "or let another teacher answer"
            )
        yield HostedQuestion(
            prompt_id=prompt.id,
            name=f"prompt {prompt_label(prompt)}",
            model=teacher.service_model,
            api=teacher.where.api,
            content=_content(teacher, prompt, template),
            sampling=sampling,
            seed=row_seed(sampling, "teacher", prompt.id) % _SEEDS,
            top_logprobs=teacher.where.top_logprobs,
        )


def _content(teacher: HostedTeacher, prompt: Prompt, template: TemplateName) -> list[dict[str, Any]] | str:
    if teacher.where.api == "chat":
        return sent_turns(prompt)
    return alpaca_text(prompt) if template == "alpaca" else plain_text(prompt)
