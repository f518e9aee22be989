"""Prompts in the tokens of a model, without those that leave no room for an answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.image_prompts import expanded_lengths
from limbeck.pipeline.text_only import text_options
from limbeck.prompts.lengths import Fitting, LengthCheck
from limbeck.prompts.templates import TemplateName, encode_prompts
from limbeck.types import Prompt, TokenPrompt


def fitting_prompts(
    context: RunContext, prompts: Sequence[Prompt], tokenizer: Any, template: TemplateName, *, max_new_tokens: int
) -> Fitting:
    """Prompts as a recipe has them read.

    Args:
        max_new_tokens: room that an answer needs behind each.

    Raises:
        LimbeckError: one cannot be read, or is too long where the recipe does not drop such.
    """
    check = length_check(context, max_new_tokens)
    kept = fit_of_lot(context, prompts, tokenizer, template, text_options(context, tokenizer), check)
    check.finish()
    return Fitting(kept=kept, dropped=tuple(check.dropped), limit=check.limit)


def length_check(context: RunContext, max_new_tokens: int) -> LengthCheck:
    """The check of the lengths of a recipe's prompts."""
    section = context.recipe.prompts
    return LengthCheck(
        window=context.window or sys.maxsize,
        max_new_tokens=max_new_tokens,
        too_long=section.too_long,
        longest=section.max_prompt_length,
    )


def fit_of_lot(
    context: RunContext,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    template: TemplateName,
    options: Mapping[str, Any],
    check: LengthCheck,
) -> tuple[TokenPrompt, ...]:
    """Some of a recipe's prompts as it has them read, but for those that a check of lengths leaves out.

    Args:
        options: those of `limbeck.pipeline.text_only.text_options`.

    Raises:
        LimbeckError: one cannot be read.
    """
    control = context.recipe.prompts.control_tokens
    encoded = encode_prompts(prompts, tokenizer, template, control_tokens=control, chat_options=options)
    return check.kept(encoded, expanded_lengths(context, encoded))
