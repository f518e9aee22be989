"""Names of the metrics of fidelity, and measurements on tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.types import Head

FIDELITY: tuple[str, ...] = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "acceptance",
    "top1_agreement",
    "topk_agreement",
    "student_entropy",
    "teacher_entropy",
    "entropy_gap",
    "entropy_gap_size",
    "student_nll",
    "teacher_nll",
)

# Whose confidence against what, in the order of `TokenValues.confidences`.
CALIBRATION: tuple[str, ...] = ("student_ece", "teacher_ece", "ece_to_teacher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The student's hidden states at the positions that predict response tokens, example after example.

    Attributes:
        student_hidden_ND: N is the sum of `lengths`.
        label_ids_N: the response token that each position predicts, int64.
        ids: the examples in this chunk, in order. An example may go on in a later chunk.
        lengths: positions of each example in this chunk.
    """

    student_hidden_ND: Tensor
    student_head: Head
    label_ids_N: Tensor
    ids: tuple[str, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """Measurements on N tokens.

    Attributes:
        values_MN: the metrics of `names`, float64.
        confidences: (confidence, outcome) of the likeliest token, float64: the student's and whether it followed, the
            teacher's and whether that followed, the student's and the teacher's probability of it.
        names: of the metrics.
        calibrations: the metric that each of the confidences makes.
    """

    values_MN: Tensor
    confidences: tuple[tuple[Tensor, Tensor], ...]
    names: tuple[str, ...] = FIDELITY
    calibrations: tuple[str, ...] = CALIBRATION
