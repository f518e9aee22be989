"""Length check: the model's window must hold prompt and answer together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from limbeck.types import LimbeckError, TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """The prompts that fit, in the order given, and the ids of those that were dropped.

    Attributes:
        limit: the most tokens that a prompt may have.
    """

    kept: tuple[TokenPrompt, ...]
    dropped: tuple[str, ...]
    limit: int


def check_lengths(
    prompts: Sequence[TokenPrompt],
    *,
    window: int,
    max_new_tokens: int,
    too_long: Literal["error", "drop"] = "error",
    longest: int | None = None,
    lengths: Mapping[str, int] = MappingProxyType({}),
) -> Fitting:
    """Refuse or drop the prompts that leave no room for their answer.

    Args:
        window: the model's context in tokens; a prompt may have at most window - max_new_tokens of them.
        longest: a lower limit than the window's, in tokens; None for none.
        lengths: tokens of prompts by id where they are more than the ids, as with images.
        too_long: "error" stops at the first; "drop" leaves them out and says which.

    Raises:
        LimbeckError: a prompt that is too long (naming it, its length, the limit and the remedy), a window with no room
            for any prompt, or a split that had prompts and lost them all.
    """
    if too_long not in ("error", "drop"):
        raise LimbeckError(f"prompts.too_long is {too_long!r}, expected error or drop")
    limit = window - max_new_tokens
    why = f"window {window} - responses.max_new_tokens {max_new_tokens}"
    if limit < 1:
        raise LimbeckError(
            f"responses.max_new_tokens is {max_new_tokens} and the window {window} tokens, so no prompt fits; lower it"
        )
    if longest is not None and longest < limit:
        limit, why = longest, "prompts.max_prompt_length"
    remedy = "raise prompts.max_prompt_length" if limit == longest else "lower responses.max_new_tokens"
    tokens = {prompt.id: lengths.get(prompt.id, len(prompt.ids)) for prompt in prompts}
    long = [prompt for prompt in prompts if tokens[prompt.id] > limit]
    if long and too_long == "error":
        more = f", and {len(long) - 1} more are too long" if len(long) > 1 else ""
        raise LimbeckError(
            f"prompt {long[0].label or long[0].id} has {tokens[long[0].id]} tokens, expected at most {limit} "
            f"({why}){more}; "
            f"{remedy}, shorten the prompts, or set prompts.too_long to drop"
        )
    kept = tuple(prompt for prompt in prompts if tokens[prompt.id] <= limit)
    for split in sorted({prompt.split for prompt in prompts} - {prompt.split for prompt in kept}):
        raise LimbeckError(
            f"every {split} prompt has more than {limit} tokens, so dropping the long ones leaves none; "
            f"{remedy} or give shorter prompts"
        )
    return Fitting(kept=kept, dropped=tuple(prompt.id for prompt in long), limit=limit)
