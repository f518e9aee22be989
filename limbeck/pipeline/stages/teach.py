"""Stage 3: what the teacher says of every response token, written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from limbeck.models.heads import head_of
from limbeck.models.vocabulary import real_vocab_size
from limbeck.pipeline.build import sparse_form
from limbeck.pipeline.engine import RunContext, Stage
from limbeck.pipeline.stages.respond import captures, load_responses, teacher_inputs
from limbeck.rollouts.collate import collate
from limbeck.runtime.rundir import link
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.stored import StoredTeacher, dense_rows, sparse_rows, write_head, write_signal
from limbeck.types import DenseSignal, Json, Teacher

# Rows of one shard of the signal, the unit that is redone after an interruption, and of one forward pass.
SHARD_ROWS = 64
SCORING_BATCH_SIZE = 16


def _signal_inputs(context: RunContext) -> Json:
    form = sparse_form(context.recipe)
    inputs = {
        "cache": context.recipe.signal.cache,
        "dtype": context.recipe.signal.dtype,
        "teacher": teacher_inputs(context),
    }
    if not captures(context) and not _judges_train(context):
        inputs["split"] = "heldout"
    return inputs if form is None else inputs | {"sparse": asdict(form)}


def _play_signal(context: RunContext) -> Json:
    if not context.recipe.signal.cache:
        return {"cached": False}

    run = context.run
    loaded = context.load_teacher()
    head = head_of(loaded.model, real_vocab_size(loaded.tokenizer))
    write_head(run.signal, head)
    captured = sorted((run.responses / "batches").glob("[0-9]*.safetensors"))
    for path in captured:
        target = run.signal / path.name
        if not target.exists():
            link(path, target)
    tokens = 0 if captured else _judge(context, LocalTeacher(loaded.model, head))
    size = sum(path.stat().st_size for path in run.signal.iterdir())
    return {"cached": True, "captured_while_sampling": bool(captured), "tokens": tokens, "mib": size >> 20}


def _judge(context: RunContext, teacher: LocalTeacher) -> int:
    """One pass of the teacher over all responses, a shard at a time; shards on disk are not judged again.

    With a sparse support the held-out rows are kept whole: evaluation measures over the whole vocabulary.
    """
    responses = load_responses(context, "heldout")
    if _judges_train(context):
        responses |= load_responses(context, "train")
    form, dtype = sparse_form(context.recipe), getattr(torch, context.recipe.signal.dtype)
    rows = sorted(responses, key=lambda row: (-responses[row].length, row))
    tokens = sum(r.tokens for r in responses.values())
    with context.console.meter("teach", tokens, "tokens") as meter:
        for number in range(0, len(rows), SHARD_ROWS):
            path = context.run.signal / f"{number // SHARD_ROWS:05d}.safetensors"
            shard = rows[number : number + SHARD_ROWS]
            if not path.exists():
                hidden: dict[int, Any] = {}
                for start in range(0, len(shard), SCORING_BATCH_SIZE):
                    micro = shard[start : start + SCORING_BATCH_SIZE]
                    batch = collate(responses, micro, pad_id=0)
                    parts = teacher.signal(batch).hidden_ND.split([responses[r].tokens for r in micro])
                    hidden |= dict(zip(micro, parts, strict=True))
                whole = {row: h for row, h in hidden.items() if form is None or responses[row].split == "heldout"}
                tensors = dense_rows(whole, dtype=dtype)
                if form is not None:
                    # The seed of a row's draws is its number: an interrupted pass draws what a whole one would.
                    kept = hidden.keys() - whole.keys()
                    signals = {row: DenseSignal(hidden_ND=hidden[row], head=teacher.head) for row in kept}
                    tensors |= sparse_rows({row: form.of(signal, seed=row) for row, signal in signals.items()})
                write_signal(path, tensors)
            meter.advance(sum(responses[row].tokens for row in shard))
    return tokens


def _judges_train(context: RunContext) -> bool:
    """Whether anybody asks what the teacher says of the training responses that are there before training."""
    return not context.recipe.on_policy or context.recipe.sft_on_responses


def local_teacher(context: RunContext) -> LocalTeacher:
    """The teacher itself, which judges what is only written during training."""
    loaded = context.load_teacher()
    return LocalTeacher(loaded.model, head_of(loaded.model, real_vocab_size(loaded.tokenizer)))


def open_teacher(context: RunContext, rows: Sequence[int]) -> Teacher:
    """The teacher for training and evaluation: what is on disk, or the model itself where the recipe keeps nothing.

    Args:
        rows: row on disk of each response of the list that batches are made of.
    """
    if context.recipe.signal.cache:
        form = sparse_form(context.recipe)
        temperatures = () if form is None else form.temperatures
        return StoredTeacher.open(context.run.signal, rows=rows, device=context.device, temperatures=temperatures)
    return local_teacher(context)


STAGE = Stage(
    name="teach",
    inputs=_signal_inputs,
    play=_play_signal,
    outputs=lambda run: (run.signal,),
    intermediate=True,
)
