"""Prompts in the tokens of a model, without those that leave no room for an answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.image_prompts import expanded_lengths
from limbeck.pipeline.text_only import text_options
from limbeck.prompts.lengths import Fitting, check_lengths
from limbeck.prompts.templates import TemplateName, encode_prompts
from limbeck.types import Prompt


def fitting_prompts(
    context: RunContext, prompts: Sequence[Prompt], tokenizer: Any, template: TemplateName, *, max_new_tokens: int
) -> Fitting:
    """Prompts as a recipe has them read.

    Args:
        max_new_tokens: room that an answer needs behind each.

    Raises:
        LimbeckError: one cannot be read, or is too long where the recipe does not drop such.
    """
    section = context.recipe.prompts
    encoded = encode_prompts(
        prompts,
        tokenizer,
        template,
        control_tokens=section.control_tokens,
        chat_options=text_options(context, tokenizer),
    )
    return check_lengths(
        encoded,
        window=context.window or sys.maxsize,
        max_new_tokens=max_new_tokens,
        too_long=section.too_long,
        longest=section.max_prompt_length,
        lengths=expanded_lengths(context, encoded),
    )
