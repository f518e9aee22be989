"""Length check: the model's window must hold prompt and answer together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from limbeck.types import LimbeckError, Split, TokenPrompt


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
    check = LengthCheck(window=window, max_new_tokens=max_new_tokens, too_long=too_long, longest=longest)
    kept = check.kept(prompts, lengths)
    check.finish()
    return Fitting(kept=kept, dropped=tuple(check.dropped), limit=check.limit)


@dataclass(kw_only=True)
class LengthCheck:
    """The check of `check_lengths` for prompts that come in lots.

    Attributes:
        dropped: ids of the prompts that are too long, as they come.
    """

    window: int
    max_new_tokens: int
    too_long: Literal["error", "drop"] = "error"
    longest: int | None = None
    dropped: list[str] = field(default_factory=list)
    _first: tuple[str, int] | None = None
    _met: set[Split] = field(default_factory=set)
    _left: set[Split] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.too_long not in ("error", "drop"):
            raise LimbeckError(f"prompts.too_long is {self.too_long!r}, expected error or drop")
        if self._room < 1:
            raise LimbeckError(
                f"responses.max_new_tokens is {self.max_new_tokens} and the window {self.window} tokens, so no prompt "
                "fits; lower it"
            )

    @property
    def limit(self) -> int:
        """The most tokens that a prompt may have."""
        return self._room if self.longest is None else min(self._room, self.longest)

    @property
    def _room(self) -> int:
        return self.window - self.max_new_tokens

    def kept(
        self, prompts: Sequence[TokenPrompt], lengths: Mapping[str, int] = MappingProxyType({})
    ) -> tuple[TokenPrompt, ...]:
        """The prompts of a lot that fit."""
        kept = []
        for prompt in prompts:
            self._met.add(prompt.split)
            if (tokens := lengths.get(prompt.id, len(prompt.ids))) <= self.limit:
                self._left.add(prompt.split)
                kept.append(prompt)
                continue
            self._first = self._first or (prompt.label or prompt.id, tokens)
            self.dropped.append(prompt.id)
        return tuple(kept)

    def finish(self) -> None:
        """Refuse what is only known of all lots together.

        Raises:
            LimbeckError: as `check_lengths`.
        """
        remedy = "raise prompts.max_prompt_length" if self.limit == self.longest else "lower responses.max_new_tokens"
        if self._first is not None and self.too_long == "error":
            why = f"window {self.window} - responses.max_new_tokens {self.max_new_tokens}"
            why = "prompts.max_prompt_length" if self.limit < self._room else why
            name, tokens = self._first
            more = f", and {len(self.dropped) - 1} more are too long" if len(self.dropped) > 1 else ""
            raise LimbeckError(
                f"prompt {name} has {tokens} tokens, expected at most {self.limit} ({why}){more}; "
                f"{remedy}, shorten the prompts, or set prompts.too_long to drop"
            )
        for split in sorted(self._met - self._left):
            raise LimbeckError(
                f"every {split} prompt has more than {self.limit} tokens, so dropping the long ones leaves none; "
                f"{remedy} or give shorter prompts"
            )
