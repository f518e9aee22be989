"""Checks of prompts and settings for samplers that run models, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from limbeck.models.heads import causal_model
from limbeck.types import LimbeckError, Sampling, TokenPrompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def check_sizes(batch_size: int, pad_token_id: int, vocab_size: int) -> None:
    """Check a sampler's sizes.

    Raises:
        LimbeckError: no rows, or a pad token outside the vocabulary.
    """
    if batch_size < 1:
        raise LimbeckError(f"batch_size is {batch_size}, expected at least 1: set it to the rows that fit")
    if not 0 <= pad_token_id < vocab_size:
        raise LimbeckError(
            f"pad_token_id is {pad_token_id}, expected an id below vocab_size {vocab_size}: "
            "any real token will do, the end-of-sequence token for example"
        )


def check_settings(sampling: Sampling) -> None:
    """Check the sampling settings.

    Raises:
        LimbeckError: one does not.
    """
    limits = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (sampling.temperature >= 0, "0 (greedy) or more"),
        "top_p": (0 < sampling.top_p <= 1, "a mass in (0, 1]"),
        "top_k": (sampling.top_k >= 0, "0 (the whole vocabulary) or more"),
        "stop": (all(sampling.stop), "strings that are not empty"),
    }
    for name, (fine, expected) in limits.items():
        if not fine:
            raise LimbeckError(
                f"sampling.{name} is {getattr(sampling, name)!r}, expected {expected}: correct the recipe"
            )


def require_text(prompts: Sequence[TokenPrompt]) -> None:
    """No prompt holds images, for samplers that read text alone.

    Raises:
        LimbeckError: one does.
    """
    if with_image := next((prompt for prompt in prompts if prompt.images), None):
        raise LimbeckError(
            f"prompt {with_image.id!r} has images, which a sampler of two models does not read; "
            "sample from one model alone"
        )


def check_prompts(
    prompts: Sequence[TokenPrompt],
    sampling: Sampling,
    *,
    models: Sequence[nn.Module],
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Check that every prompt can be answered with these settings by all models of the sampler.

    Raises:
        LimbeckError: impossible settings, stop strings without a tokenizer, an empty prompt, ids outside the
            vocabulary, or a prompt that leaves no room for `max_new_tokens` in a model's window.
    """
    check_settings(sampling)
    if sampling.stop and tokenizer is None:
        raise LimbeckError(
            f"stop strings {sampling.stop!r} were given without a tokenizer to read the text with: pass tokenizer="
        )
    window = min((limit for limit in map(_window, models) if limit is not None), default=None)
    for prompt in prompts:
        if not prompt.ids:
            raise LimbeckError(f"prompt {prompt.id!r} has no tokens, expected at least one: drop it from the set")
        if min(prompt.ids) < 0 or max(prompt.ids) >= vocab_size:
            raise LimbeckError(
                f"prompt {prompt.id!r} holds ids from {min(prompt.ids)} to {max(prompt.ids)}, expected 0 to "
                f"{vocab_size - 1}: tokenise it with this model's own tokenizer"
            )
        if window is not None and len(prompt.ids) + sampling.max_new_tokens > window:
            raise LimbeckError(
                f"prompt {prompt.id!r} has {len(prompt.ids)} tokens and max_new_tokens is "
                f"{sampling.max_new_tokens}, expected at most {window} together (the model's window): "
                "shorten the prompt or max_new_tokens"
            )


def _window(model: nn.Module) -> int | None:
    return getattr(causal_model(model).config.get_text_config(decoder=True), "max_position_embeddings", None)


def cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes of keys and values that a token of context costs."""
    config = causal_model(model).config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * causal_model(model).dtype.itemsize


def batches_left(plan: Iterable[tuple[int, ...]], done: Iterable[int]) -> list[tuple[int, ...]]:
    """The batches of a plan with an index that is not done."""
    skipped = frozenset(done)
    return [batch for batch in plan if not skipped.issuperset(batch)]


def plan_batches(
    prompts: Sequence[TokenPrompt], sampling: Sampling, batch_size: int, slots_at_most: int
) -> list[tuple[int, ...]]:
    """The batches, longest prompts first, as indices into the list of prompts.

    Args:
        batch_size: rows at most.
        slots_at_most: tokens of context for which there is memory; longer prompts make smaller batches.
    """
    lengths = [len(prompt.ids) for prompt in prompts]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches, first = [], 0
    while first < len(order):
        slots = lengths[order[first]] + sampling.max_new_tokens
        rows = max(1, min(batch_size, slots_at_most // slots))
        batches.append(tuple(order[first : first + rows]))
        first += rows
    return batches
