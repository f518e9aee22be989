"""Distances of both models at every token, tile by tile from their hidden states: the values behind fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.evaluation.token_metrics.distances import DISTANCES, Distances
from limbeck.evaluation.token_metrics.likeliest import WIDTH, likeliest
from limbeck.evaluation.token_metrics.values import FIDELITY, Chunk, TokenValues
from limbeck.objectives import logit_tiles
from limbeck.objectives.fused.body import Block, Compile, block_rows, resolve_compile, run_body
from limbeck.objectives.fused.tile_pass import keep_small_buffers
from limbeck.types import DenseSignal, LimbeckError

# Without a compiler every step of the work has a result of its own: fewer rows keep those near the processor.
PLAIN_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityChunk(Chunk):
    """Hidden states of both models at the positions that predict response tokens.

    Attributes:
        teacher: hidden states (N, its own D) and head; both heads must have the same number of real tokens.
    """

    teacher: DenseSignal


@torch.no_grad()
def fidelity_values(chunk: FidelityChunk, *, top_k: int, compile: Compile = "auto") -> TokenValues:
    """The metrics of every token of a chunk.

    Raises:
        LimbeckError: shapes or vocabularies disagree, or the vocabulary has fewer than `top_k` tokens.
    """
    _check(chunk, top_k)
    keep_small_buffers()
    label_N, V = chunk.label_ids_N, chunk.student_head.vocab_size
    compiled = resolve_compile(compile, V, label_N.device)
    distances_PN = torch.empty(len(DISTANCES), len(label_N), dtype=torch.float64, device=label_N.device)
    # Ids of the student's and the teacher's likeliest tokens, and how far the teacher's logit of the student's first
    # lies below its own first.
    ids_2NK = torch.empty(2, len(label_N), top_k, dtype=torch.int64, device=label_N.device)
    below_N = torch.empty_like(distances_PN[0])
    for tokens, student_NV, teacher_NV in logit_tiles(chunk.student_hidden_ND, chunk.student_head, chunk.teacher):
        rows = block_rows(V, student_NV.dtype, student_NV.device) if compiled else PLAIN_ROWS
        tile = _tile(student_NV, teacher_NV, label_N[tokens])
        for start in range(0, len(student_NV), rows):
            distances_PN[:, tokens][:, start : start + rows] = _block(tile, slice(start, start + rows), compiled)
        for side, name in enumerate(("student", "teacher")):
            ids_2NK[side, tokens] = likeliest(tile[name], tile[f"{name}_maxima"], top_k)
        first_NK = torch.stack([ids_2NK[0, tokens, 0], ids_2NK[1, tokens, 0]], dim=1)
        pair_N2 = teacher_NV.gather(1, first_NK).double()
        below_N[tokens] = pair_N2[:, 0] - pair_N2[:, 1]
    return _assembled(dict(zip(DISTANCES, distances_PN, strict=True)), ids_2NK, below_N, label_N)


def _tile(student_NV: Tensor, teacher_NV: Tensor, label_N: Tensor) -> Block:
    N, V = student_NV.shape
    maxima = {name: student_NV.new_empty(N, -(-V // WIDTH)) for name in ("student_maxima", "teacher_maxima")}
    return {"student": student_NV, "teacher": teacher_NV, "label": label_N, **maxima}


def _block(tile: Block, rows: slice, compiled: bool) -> Tensor:
    """Distances of some rows of a tile; a compiled body gets its last block filled up with idle rows."""
    block = {name: column[rows] for name, column in tile.items()}
    count = len(block["label"])
    idle = rows.stop - rows.start - count
    if not compiled or not idle:
        return run_body(Distances(), block, compiled)
    filled = {name: torch.cat([c, c[-1:].expand(idle, *c.shape[1:])]) for name, c in block.items()}
    distances_PN = run_body(Distances(), filled, compiled)[:, :count]
    for name in ("student_maxima", "teacher_maxima"):
        block[name].copy_(filled[name][:count])
    return distances_PN


def _assembled(d: dict[str, Tensor], ids_2NK: Tensor, below_N: Tensor, label_N: Tensor) -> TokenValues:
    student_NK, teacher_NK = ids_2NK
    student_N, teacher_N = student_NK[:, 0], teacher_NK[:, 0]
    gap_N = d["student_entropy"] - d["teacher_entropy"]
    values = d | {
        "acceptance": 1 - d["total_variation"],
        "top1_agreement": (student_N == teacher_N).double(),
        "topk_agreement": (teacher_NK[:, :, None] == student_NK[:, None, :]).any(2).double().mean(1),
        "entropy_gap": gap_N,
        "entropy_gap_size": gap_N.abs(),
    }
    sure_student_N, sure_teacher_N = (-d["student_log_z"]).exp(), (-d["teacher_log_z"]).exp()
    return TokenValues(
        values_MN=torch.stack([values[name] for name in FIDELITY]),
        confidences=(
            (sure_student_N, (student_N == label_N).double()),
            (sure_teacher_N, (teacher_N == label_N).double()),
            (sure_student_N, (below_N - d["teacher_log_z"]).exp()),
        ),
    )


def _check(chunk: FidelityChunk, top_k: int) -> None:
    N = len(chunk.student_hidden_ND)
    counts: Sequence[int] = (len(chunk.teacher.hidden_ND), len(chunk.label_ids_N), sum(chunk.lengths))
    if any(count != N for count in counts) or len(chunk.ids) != len(chunk.lengths):
        raise LimbeckError(
            f"got {N} student positions, {counts[0]} of the teacher, {counts[1]} labels and lengths that sum to "
            f"{counts[2]} for {len(chunk.ids)} examples; expected one of each per position: align them by loss_mask_BT"
        )
    if not 1 <= top_k <= chunk.student_head.vocab_size:
        raise LimbeckError(
            f"evaluate.groups.fidelity.top_k is {top_k} and the vocabulary has {chunk.student_head.vocab_size} tokens; "
            "expected 1 to as many: lower it"
        )
