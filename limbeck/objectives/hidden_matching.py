"""Matching of hidden states: the student's, through a learned projection where the widths differ, and the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.types import LimbeckError

HiddenKind = Literal["cosine", "mse"]


@dataclass(frozen=True, kw_only=True)
class HiddenPair:
    """States of one layer of the student and one of the teacher, at the N positions of the loss.

    Attributes:
        student_ND: with gradient.
        teacher_NE: without.
        projection_ED: maps the student's width to the teacher's, ``student @ projection.T``; learned with the student.
            None where the widths are equal.
    """

    student_ND: Tensor
    teacher_NE: Tensor
    projection_ED: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HiddenMatching:
    """Distance of hidden states: 1 - cosine, or the mean over the width of the squared difference.

    DistilBERT (arXiv 1910.01108) takes the cosine, TinyBERT (arXiv 1909.10351) the squared error through a learned
    projection. Several layers count by their mean.
    Limits: the cosine ignores the length of the states; both are zero at equality only of what they see.

    Attributes:
        kind: "cosine" or "mse".
    """

    name = "hidden"
    reads = frozenset({"hidden"})

    kind: HiddenKind = "cosine"

    def __post_init__(self) -> None:
        if self.kind not in get_args(HiddenKind):
            raise LimbeckError(f"hidden kind={self.kind!r}: expected one of {', '.join(get_args(HiddenKind))}")

    def value(self, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        if self.kind == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(student_ND, teacher_ND, dim=-1)
        return ((student_ND - teacher_ND) ** 2).mean(-1)


def projected(pair: HiddenPair, tokens: int) -> tuple[Tensor, Tensor]:
    """Both states at the teacher's width, float32 (float64 for float64 models).

    Raises:
        LimbeckError: where the widths differ and no fitting projection is given, or the tokens are not the loss's.
    """
    student_ND, teacher_NE, projection_ED = pair.student_ND, pair.teacher_NE.detach(), pair.projection_ED
    if projection_ED is not None:
        student_ND = torch.nn.functional.linear(student_ND, projection_ED)
    if student_ND.shape != teacher_NE.shape or len(student_ND) != tokens:
        raise LimbeckError(
            f"hidden states of shape {tuple(student_ND.shape)} (student) and {tuple(teacher_NE.shape)} (teacher): "
            "give a projection of shape (teacher width, student width), and the tokens of the loss "
            f"({tokens}) on both sides"
        )
    dtype = torch.float64 if student_ND.dtype == torch.float64 else torch.float32
    return student_ND.to(dtype), teacher_NE.to(dtype)
