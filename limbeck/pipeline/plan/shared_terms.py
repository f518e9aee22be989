"""Terms of memory that several stages have: what sampling lays out, and the tiles of logits of a loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from limbeck.models.devices import GIB
from limbeck.objectives.fused.tiles import plan_tiles
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.sizes import ModelSize
from limbeck.sampling.local import LocalSampler


def loss_bytes(case: Case, *, trained: bool = True) -> int:
    """The tiles of logits of student and teacher, and the gradients of head and hidden states."""
    model, train = case.student.model, case.recipe.train
    device = torch.device("cpu" if case.fleet.device.host else "cuda")
    rows = train.per_device_train_batch_size if trained else SCORING_BATCH_SIZE
    tokens = max(round(rows * min(case.work.train.answer * 1.5, case.recipe.responses.max_new_tokens)), 1)
    numbers = [torch.float32] * (1 + (case.reads_teacher and case.recipe.teacher.support == "full"))
    vocabulary = max(model.vocabulary, 1)
    tiling = plan_tiles(tokens, vocabulary, numbers, device, None)
    tiles = tiling.tile_rows * vocabulary * 4 * len(numbers)
    if not trained:
        return tiles
    head = model.head * 4 if case.student.head_trained else 0
    return tiles + head + 2 * tokens * model.width * 4


def sampling_terms(case: Case, model: ModelSize, number: int, rows: int) -> Iterator[tuple[str, float]]:
    """Keys and values of a batch, and on a CPU the weights that are laid out for it."""
    texts = case.work.train if case.work.train.count else case.work.heldout
    slots = texts.longest - texts.answer + case.recipe.responses.max_new_tokens
    most = case.recipe.responses.cache_gib * GIB
    yield "keys and values", min(rows * slots * model.kv_bytes(number), max(most, slots * model.kv_bytes(number)))
    if case.fleet.device.host and number == 4:
        yield "packed weights", min(model.linears * number, LocalSampler.packed_gib * GIB)
