"""Trainings on another number of ranks, and ranks that are lost on the way.

An update depends on the responses of a step and not on how ranks and micro-batches share them, so that a training goes
on with any number of ranks that makes a step of as many. What a step has is in the fingerprint of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from limbeck.pipeline.context import RunContext, Stage
from limbeck.recipe.keys import fingerprinted, fingerprinted_member
from limbeck.recipe.optimizers import OPTIM_KEY
from limbeck.runtime import heartbeat
from limbeck.runtime.errors import is_lost_rank, lost_rank_line
from limbeck.types import Json, LimbeckError


def train_inputs(context: RunContext) -> Json:
    """The section `train` with the responses of a step over all ranks in the place of its factors."""
    inputs, lm = fingerprinted(context.recipe.train), context.recipe.train.lm
    rows = step_rows(context)
    inputs |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    inputs |= {"optim": fingerprinted_member(OPTIM_KEY, context.recipe.train.optim)}
    if lm is not None and lm.per_device_batch_size is not None:
        train = context.recipe.train
        blocks = lm.per_device_batch_size * train.gradient_accumulation_steps * context.launch.ranks
        inputs["lm"] |= {"per_device_batch_size": None if blocks == rows else blocks}
    return inputs


def step_rows(context: RunContext) -> int:
    """Responses of an optimizer step over all ranks."""
    train = context.recipe.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * context.launch.ranks


def with_ranks(context: RunContext, ranks: int) -> RunContext:
    """The context of the same run in a launch of another number of ranks."""
    other = replace(context)
    other.launch = replace(context.launch, ranks=ranks)
    return other


def made_with_other_ranks(context: RunContext, stages: Sequence[Stage], stage: Stage) -> int | None:
    """How many ranks a stage was made with, where that is all in which its inputs differ; else None."""
    record = context.run.manifest(stage.name) or {}
    ranks = record.get("ranks")
    if not isinstance(ranks, int) or ranks == context.launch.ranks:
        return None
    return ranks if with_ranks(context, ranks).fingerprints(stages)[stage.name] == record["fingerprint"] else None


def ranks_refusal(context: RunContext, ranks: int) -> str:
    """The sentence for a training of another number of ranks, and so of other steps."""
    there, here = step_rows(with_ranks(context, ranks)), step_rows(context)
    own = here // context.recipe.train.per_device_train_batch_size
    fitting = f", or give train.per_device_train_batch_size={there // own}" if there % own == 0 else ""
    return (
        f"{context.run.checkpoints} was made with {there} responses per step and this launch has {here}; launch "
        f"{ranks} processes again, or delete {context.run.checkpoints} to train from the start{fitting}"
    )


@contextmanager
def naming_lost_ranks(context: RunContext) -> Iterator[None]:
    """Name the ranks that give no sign of life any more, where an exchange with the others fails inside the block."""
    try:
        yield
    except Exception as error:
        if not is_lost_rank(error):
            raise
        # Long enough for each living one to give a sign.
        silent = heartbeat.silent_ranks(context.signs, 3 * heartbeat.INTERVAL_S)
        raise LimbeckError(lost_rank_line(error, heartbeat.ranks_in_words(silent) if silent else None)) from error
