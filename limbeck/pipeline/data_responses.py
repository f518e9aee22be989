"""Answers of the data as responses, a lot of prompts at a time, so that memory does not grow with the rows.

Prompts are read twice: once for those that are too long, which are left out or refused before anything is written, and
once with their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.fitting_prompts import fit_of_lot, length_check
from limbeck.pipeline.student_endings import same_tokens
from limbeck.pipeline.text_only import load_student_tokenizer, text_options
from limbeck.prompts.templates import LossOn, TemplateName, encode_responses, resolve_template
from limbeck.types import Prompt, Response

# Prompts of a lot, and characters of them and their answers: fewer prompts where they are very long.
LOT, LOT_CHARACTERS = 2048, 1 << 23


def by_data_alone(context: RunContext) -> bool:
    """Whether the data's answers are all that is written, and no model is asked the prompts themselves.

    A student that answers later is asked them from memory, and what the teacher sees of each is kept there.
    """
    return context.recipe.base_author == "data" and not context.recipe.on_policy and context.seen is None


def reader_of_data(context: RunContext, prompts: Iterable[Prompt]) -> tuple[Any, TemplateName]:
    """The tokenizer and the template of the data's answers: of a student with tokens of its own, those."""
    tokenizer = context.teacher.tokenizer if same_tokens(context) else load_student_tokenizer(context)
    return tokenizer, resolve_template(context.recipe.prompts.template, tokenizer, prompts)


def too_long_prompts(
    context: RunContext, prompts: Iterable[Prompt], tokenizer: Any, template: TemplateName
) -> frozenset[str]:
    """The ids of the prompts that leave no room for an answer, said on the console.

    Raises:
        LimbeckError: one cannot be read, or is too long where the recipe does not drop such.
    """
    check = length_check(context, context.recipe.responses.max_new_tokens)
    options = text_options(context, tokenizer)
    for lot in lots_of(prompts):
        fit_of_lot(context, lot, tokenizer, template, options, check)
    check.finish()
    say_dropped(context, len(check.dropped), check.limit)
    return frozenset(check.dropped)


def say_dropped(context: RunContext, count: int, limit: int) -> None:
    if count:
        context.console.warn(f"{count} prompts are longer than {limit} tokens and were dropped")


def data_responses(
    context: RunContext,
    prompts: Iterable[Prompt],
    tokenizer: Any,
    template: TemplateName,
    *,
    takes: Callable[[Prompt], bool],
    loss_on: LossOn,
) -> Iterator[Response]:
    """Reference answers of the data, encoded as they are asked for; how many are cut is said after the last one.

    Args:
        takes: whether the answer to a prompt is wanted.

    Raises:
        LimbeckError: a prompt without an answer, or one that cannot be encoded.
    """
    section, options = context.recipe.prompts, text_options(context, tokenizer)
    most, count, cut = context.recipe.responses.max_new_tokens, 0, 0
    for lot in lots_of(filter(takes, prompts)):
        for response in encode_responses(
            lot,
            tokenizer,
            template,
            max_new_tokens=most,
            control_tokens=section.control_tokens,
            chat_options=options,
            loss_on=loss_on,
        ):
            count, cut = count + 1, cut + (response.stop == "length")
            yield response
    if cut:
        context.console.warn(
            f"{cut} of the data's {count} answers have more than {most} tokens and are cut there, without an end "
            "(responses.max_new_tokens)"
        )


def lots_of(prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts in lots that fit into memory, in their order."""
    lot: list[Prompt] = []
    characters = 0
    for prompt in prompts:
        lot.append(prompt)
        characters += sum(len(turn.content) for turn in prompt.messages or ())
        characters += len(prompt.text or "") + len(prompt.completion or "")
        if len(lot) == LOT or characters >= LOT_CHARACTERS:
            yield lot
            lot, characters = [], 0
    if lot:
        yield lot
