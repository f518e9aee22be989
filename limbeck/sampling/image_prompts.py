"""Prompts with images as the model that writes reads them: placeholders expanded, positions of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.models.image_features import ExpandedRow
from limbeck.models.vision import embedded, positions, require_reader
from limbeck.types import TokenPrompt

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedPrompt(TokenPrompt):
    """A prompt whose ids are those that one model reads.

    Attributes:
        asked: the prompt with its placeholders.
        row: what of it is images.
        places: positions (3, T) of its tokens where the model has such.
    """

    asked: TokenPrompt
    row: ExpandedRow
    places: Tensor | None = field(default=None, compare=False)

    @property
    def shift(self) -> int:
        """By how much the position of a token behind the prompt differs from the number of tokens before it."""
        return 0 if self.places is None else int(self.places.max()) + 1 - len(self.ids)


def expanded_prompts(model: nn.Module, prompts: Sequence[TokenPrompt]) -> Sequence[TokenPrompt]:
    """The prompts as a model reads them; those without images as they are.

    Raises:
        LimbeckError: the model reads text alone, or a prompt has another number of placeholders than of images.
    """
    if not any(prompt.images for prompt in prompts):
        return prompts
    return [_expanded(model, prompt) if prompt.images else prompt for prompt in prompts]


def _expanded(model: nn.Module, prompt: TokenPrompt) -> TokenPrompt:
    if isinstance(prompt, ExpandedPrompt):
        return prompt
    row = require_reader(model).expand(prompt.ids, prompt.images)
    return ExpandedPrompt(
        id=prompt.id,
        ids=row.ids,
        split=prompt.split,
        label=prompt.label,
        images=prompt.images,
        asked=prompt,
        row=row,
        places=positions(model, row),
    )


def shift_of(prompt: TokenPrompt) -> int:
    """See `ExpandedPrompt.shift`; 0 for text."""
    return prompt.shift if isinstance(prompt, ExpandedPrompt) else 0


def image_inputs(
    model: nn.Module, prompts: Sequence[TokenPrompt], ids_RT: Tensor, positions_RT: Tensor
) -> dict[str, Any]:
    """What a decoder is given instead of ids, and the positions, of prompts padded on the left."""
    width = ids_RT.shape[1]
    from_image_RT = torch.zeros_like(ids_RT, dtype=torch.bool)
    names: list[str] = []
    every = positions_RT
    if any(isinstance(prompt, ExpandedPrompt) and prompt.places is not None for prompt in prompts):
        every = positions_RT.expand(3, *positions_RT.shape).clone()
    for r, prompt in enumerate(prompts):
        if not isinstance(prompt, ExpandedPrompt):
            continue
        first = width - len(prompt.ids)
        from_image_RT[r, first:] = torch.tensor(prompt.row.from_image, device=ids_RT.device)
        names += prompt.images
        if prompt.places is not None:
            every[:, r, first:] = prompt.places.to(every.device)
    return {"inputs_embeds": embedded(model, ids_RT, from_image_RT, names), "position_ids": every}
