"""Tiles: some tokens by the whole vocabulary, as many as a byte budget allows. Nothing of size N x V ever exists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from limbeck.objectives.fused.body import block_rows
from limbeck.objectives.fused.projection import Projection, prepare_projection
from limbeck.types import DenseSignal, Head, LimbeckError

TILE_BYTES = 384 << 20
# Beyond this nothing is gained. Every tile reads and writes the head's gradient once, so fewer are better.
TILE_ROWS = 512
# A GPU multiplies so fast that the head's gradient, read and written by every tile, would cost more than the products.
GPU_TILE_BYTES = 5 << 28
GPU_TILE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Division of N tokens: into tiles for the matrix products, and those into blocks for the elementwise work."""

    tokens: int
    tile_rows: int
    block_rows: int

    def tiles(self) -> Iterator[slice]:
        for start in range(0, self.tokens, self.tile_rows):
            yield slice(start, min(start + self.tile_rows, self.tokens))


def plan_tiles(
    tokens: int, vocab_size: int, buffers: Sequence[torch.dtype], device: torch.device, tile_bytes: int | None
) -> Tiling:
    """Cut N tokens so that the logit buffers of a tile stay within the budget (one block is the least).

    Args:
        buffers: dtype of each buffer of logits.
        tile_bytes: the budget; None is that of the device.

    Raises:
        LimbeckError: for a budget that is not positive.
    """
    budget, most = (TILE_BYTES, TILE_ROWS) if device.type == "cpu" else (GPU_TILE_BYTES, GPU_TILE_ROWS)
    if tile_bytes is not None and tile_bytes <= 0:
        raise LimbeckError(f"tile_bytes is {tile_bytes}: expected a positive number of bytes, such as {budget}")
    block = block_rows(vocab_size, torch.float32, device)
    fitting = (tile_bytes or budget) // (vocab_size * sum(dtype.itemsize for dtype in buffers))
    rows = max(block, min(most, fitting) // block * block)
    # As many tiles as it takes, all of one size: a small last one would cost nearly as much as a whole one.
    tiles = max(1, ceil(tokens / rows))
    return Tiling(tokens=tokens, tile_rows=max(1, ceil(tokens / tiles / block)) * block, block_rows=block)


def check_pair(
    student_hidden_ND: Tensor,
    student: Projection,
    teacher_hidden_ND: Tensor,
    teacher: Projection,
    *,
    one_vocabulary: bool = True,
) -> None:
    """Refuse a teacher whose tokens or, unless they are known to differ, whose vocabulary are not the student's."""
    if teacher_hidden_ND.shape[0] != student_hidden_ND.shape[0]:
        raise LimbeckError(
            f"{student_hidden_ND.shape[0]} student tokens but {teacher_hidden_ND.shape[0]} teacher tokens: "
            "both need the positions of the loss, in the same order"
        )
    if one_vocabulary and teacher.vocab_size != student.vocab_size:
        raise LimbeckError(
            f"the student has {student.vocab_size} token ids, the teacher {teacher.vocab_size}: expected one "
            "vocabulary; set vocab_size of both heads to the number of ids the tokenizer uses (padding rows may differ)"
        )


@torch.no_grad()
def logit_tiles(
    student_hidden_ND: Tensor, student_head: Head, signal: DenseSignal, tile_bytes: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Raw logits of student and teacher, tile by tile, without gradients.

    Yields:
        (tokens, student_logits_NV, teacher_logits_NV): the slice of the N tokens and their logits over the real
        vocabulary, float32 (float64 for float64 models). The tensors are buffers: the next tile overwrites them.

    Raises:
        LimbeckError: where tokens, widths or vocabularies disagree.
    """
    student = prepare_projection(student_hidden_ND, student_head, "student")
    teacher = prepare_projection(signal.hidden_ND, signal.head, "teacher")
    check_pair(student_hidden_ND, student, signal.hidden_ND, teacher)
    device = student_hidden_ND.device
    dtypes = (student.dtype, teacher.dtype)
    plan = plan_tiles(student_hidden_ND.shape[0], student.vocab_size, dtypes, device, tile_bytes)
    buffers = [torch.empty(plan.tile_rows, student.vocab_size, dtype=dtype, device=device) for dtype in dtypes]
    for tokens in plan.tiles():
        student_NV, teacher_NV = (buffer[: tokens.stop - tokens.start] for buffer in buffers)
        student.into(student_hidden_ND[tokens], student_NV)
        teacher.into(signal.hidden_ND[tokens], teacher_NV)
        yield tokens, student.finish.logits(student_NV), teacher.finish.logits(teacher_NV)


def model_logit_tiles(hidden_ND: Tensor, head: Head, tile_bytes: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Raw logits of one model alone, as `logit_tiles` gives them: (tokens, logits_NV)."""
    student = prepare_projection(hidden_ND, head, "student")
    # Buffers of two models, so that a tile is as high as beside a teacher and its sums are rounded alike.
    plan = plan_tiles(hidden_ND.shape[0], student.vocab_size, (student.dtype,) * 2, hidden_ND.device, tile_bytes)
    buffer_NV = torch.empty(plan.tile_rows, student.vocab_size, dtype=student.dtype, device=hidden_ND.device)
    for tokens in plan.tiles():
        logits_NV = buffer_NV[: tokens.stop - tokens.start]
        student.into(hidden_ND[tokens], logits_NV)
        yield tokens, student.finish.logits(logits_NV)
