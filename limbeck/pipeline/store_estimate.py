"""The size of a recipe's store before any model runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stages import prompts as prompts_stage
from limbeck.pipeline.stages import respond as respond_stage
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.store_capture import codec_of, kept_sampling
from limbeck.pipeline.store_identity import frame_of, heldout_codec
from limbeck.prompts.io import read_prompts
from limbeck.recipe.load import Recipe
from limbeck.runtime.console import Console
from limbeck.teachers.store.addresses import address_of
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.estimate import Estimate, Length, estimate
from limbeck.types import Prompt, Split

_SPLITS: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class RecipeEstimate:
    """The size of a recipe's store.

    Attributes:
        parts: one for each codec.
        exact: false where answers are not written yet, so that each counts as long as it may become.
    """

    parts: list[Estimate]
    exact: bool


def estimate_recipe(recipe: Recipe, codec: Codec | None, *, console: Console) -> RecipeEstimate:
    """The size of the store that `capture` would write, from the texts alone.

    Raises:
        LimbeckError: the data cannot be read, or the codec makes no sense for the teacher.
    """
    context = RunContext(recipe, console)
    codec = codec or codec_of(recipe)
    lengths, exact = lengths_of(context)
    number_bytes = 4 if recipe.teacher.dtype == "float32" else 2
    train, held = (lengths[split] for split in _SPLITS)
    kept = kept_sampling(recipe) is not None
    heldout, frame = heldout_codec(context, codec), frame_of(context)
    parts = estimate(codec, heldout, frame, train, held, number_bytes=number_bytes, texts=kept)
    return RecipeEstimate(parts=parts, exact=exact)


def lengths_of(context: RunContext) -> tuple[Mapping[Split, list[Length]], bool]:
    """Tokens of each text to be scored, longest first, and whether that is known or the most it can be."""
    if context.run.done("respond"):
        return _written(context), True
    with tempfile.TemporaryDirectory() as folder:
        # Both stages without their records: no weights are read, not even to be hashed.
        scratch = RunContext(replace(context.recipe, output_dir=folder), context.console)
        prompts_stage.STAGE.run(scratch)
        if context.recipe.base_author == "data":
            respond_stage.STAGE.run(scratch)
            return _written(scratch), True
        asked, most = read_prompts(scratch.run.prompts), context.recipe.responses.max_new_tokens
        found: dict[Split, list[Length]] = {
            split: [_longest(p, most) for p in asked if p.split == split] for split in _SPLITS
        }
        return found, False


def _longest(prompt: Prompt, most: int) -> Length:
    """Lengths of a text whose answer is not written yet; of the prompt its bytes, which are more than its ids."""
    texts = [prompt.text or "", *(turn.content for turn in prompt.messages or ())]
    return Length(loss=most, ids=most + sum(len(text.encode("utf-8", "replace")) for text in texts))


def _written(context: RunContext) -> dict[Split, list[Length]]:
    found: dict[Split, list[Length]] = {}
    # One object for each: of a million texts there are a few hundred.
    known: dict[Length, Length] = {}
    for split in _SPLITS:
        texts: dict[bytes, Length] = {}
        for response in load_responses(context, split).responses:
            length = Length(loss=response.tokens, ids=response.length)
            texts[address_of(response)] = known.setdefault(length, length)
        found[split] = sorted(texts.values(), reverse=True)
    return found
