"""Fidelity: how close the student's next-token distributions are to the teacher's, at temperature 1.

p is the teacher, q the student. Every value is an expectation over the whole vocabulary of real tokens, computed from
hidden states tile by tile; what exists at once is a few tokens by the vocabulary, never all tokens by the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.flow import DenseSignal, Head, LimbeckError, ScoredRow
from limbeck.objectives import logit_tiles

FIDELITY: tuple[str, ...] = (
    "forward_kl",
    "reverse_kl",
    "total_variation",
    "acceptance",
    "top1_agreement",
    "student_entropy",
    "teacher_entropy",
    "student_nll",
    "teacher_nll",
)

# Rows of a tile that are worked on at once: their log-probabilities stay near the processor.
BLOCK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityChunk:
    """Hidden states of both models at the positions that predict response tokens, example after example.

    Attributes:
        student_hidden_ND: N is the sum of `lengths`.
        teacher: hidden states (N, its own D) and head; both heads must have the same number of real tokens.
        label_ids_N: the response token that each position predicts, int64.
        ids: the examples in this chunk, in order. An example may go on in a later chunk.
        lengths: positions of each example in this chunk.
    """

    student_hidden_ND: Tensor
    student_head: Head
    teacher: DenseSignal
    label_ids_N: Tensor
    ids: tuple[str, ...]
    lengths: tuple[int, ...]


def measure(chunks: Iterable[FidelityChunk]) -> list[ScoredRow]:
    """Fidelity of every example, in the order of first appearance: the mean over its tokens, weighted by their number.

    Sums over tokens are taken in float64. An example without response tokens yields no row.

    Raises:
        LimbeckError: shapes or vocabularies of a chunk disagree, or a value is not finite (NaN or inf in a model).
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for chunk in chunks:
        values_MN = token_values(chunk).cpu()
        start = 0
        for name, length in zip(chunk.ids, chunk.lengths, strict=True):
            if length:
                total_M = values_MN[:, start : start + length].sum(dim=1)
                sums[name] = sums[name] + total_M if name in sums else total_M
                tokens[name] = tokens.get(name, 0) + length
            start += length
    rows = []
    for name, total_M in sums.items():
        values = dict(zip(FIDELITY, (total_M / tokens[name]).tolist(), strict=True))
        broken = [metric for metric, value in values.items() if not math.isfinite(value)]
        if broken:
            raise LimbeckError(
                f"{broken[0]} of example {name!r} is {values[broken[0]]}; expected finite logits from both models: "
                "look for NaN or inf in their weights, or evaluate in float32"
            )
        rows.append(ScoredRow(id=name, weight=float(tokens[name]), values=values))
    return rows


@torch.no_grad()
def token_values(chunk: FidelityChunk) -> Tensor:
    """The metrics of `FIDELITY` for every token of a chunk, (metrics, N) float64."""
    _check(chunk)
    values_MN = torch.empty(len(FIDELITY), len(chunk.label_ids_N), dtype=torch.float64, device=chunk.label_ids_N.device)
    for tokens, student_NV, teacher_NV in logit_tiles(chunk.student_hidden_ND, chunk.student_head, chunk.teacher):
        for start in range(tokens.start, tokens.stop, BLOCK):
            block = slice(start, min(start + BLOCK, tokens.stop))
            rows = slice(block.start - tokens.start, block.stop - tokens.start)
            values_MN[:, block] = _block_values(student_NV[rows], teacher_NV[rows], chunk.label_ids_N[block])
    return values_MN


def _block_values(student_logits_NV: Tensor, teacher_logits_NV: Tensor, label_ids_N: Tensor) -> Tensor:
    top1_N = student_logits_NV.argmax(dim=1) == teacher_logits_NV.argmax(dim=1)
    logq_NV = student_logits_NV.log_softmax(dim=1)
    logp_NV = teacher_logits_NV.log_softmax(dim=1)
    q_NV, p_NV = logq_NV.exp(), logp_NV.exp()
    student_entropy_N = -torch.linalg.vecdot(q_NV, logq_NV)
    teacher_entropy_N = -torch.linalg.vecdot(p_NV, logp_NV)
    student_nll_N = -logq_NV.gather(1, label_ids_N[:, None])[:, 0]
    teacher_nll_N = -logp_NV.gather(1, label_ids_N[:, None])[:, 0]
    gap_NV = logp_NV.sub_(logq_NV)
    forward_kl_N = torch.linalg.vecdot(p_NV, gap_NV)
    reverse_kl_N = -torch.linalg.vecdot(q_NV, gap_NV)
    total_variation_N = 0.5 * p_NV.sub_(q_NV).abs_().sum(dim=1)
    values = {
        "forward_kl": forward_kl_N,
        "reverse_kl": reverse_kl_N,
        "total_variation": total_variation_N,
        "acceptance": 1 - total_variation_N.double(),
        "top1_agreement": top1_N,
        "student_entropy": student_entropy_N,
        "teacher_entropy": teacher_entropy_N,
        "student_nll": student_nll_N,
        "teacher_nll": teacher_nll_N,
    }
    return torch.stack([values[name].double() for name in FIDELITY])


def _check(chunk: FidelityChunk) -> None:
    N = len(chunk.student_hidden_ND)
    counts: Sequence[int] = (len(chunk.teacher.hidden_ND), len(chunk.label_ids_N), sum(chunk.lengths))
    if any(count != N for count in counts) or len(chunk.ids) != len(chunk.lengths):
        raise LimbeckError(
            f"got {N} student positions, {counts[0]} of the teacher, {counts[1]} labels and lengths that sum to "
            f"{counts[2]} for {len(chunk.ids)} examples; expected one of each per position: align them by loss_mask_BT"
        )
