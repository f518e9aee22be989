"""The loss of the loop: student, objective and what is learned beside the student, in one module.

Wrappers (DDP, FSDP) see one forward from token ids to loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.flow import DenseSignal, Response, Signal, Support, Teacher, TokenBatch, TopKSignal
from limbeck.models.heads import head_of
from limbeck.models.hidden import hidden_states
from limbeck.objectives import HiddenPair, Temperature, fused_distillation_loss
from limbeck.objectives.bodies import measured_on
from limbeck.objectives.sums import AnyObjective, CrossEntropy, leaves, part_names, row_leaves
from limbeck.student.batches import collate


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What moves over training, as it stands at a step: the temperature, and options of the objective."""

    temperature: Temperature = field(default_factory=Temperature)
    options: Mapping[str, float] = field(default_factory=dict)


class StudentLoss(nn.Module):
    """Student and objective.

    Attributes:
        projection_ED: maps the student's last hidden states to the teacher's width for objectives on hidden states;
            learned with the student and left behind when it is saved. None where nothing needs it.
        stats: names of the sums that `forward` gives beside the loss.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: AnyObjective,
        *,
        support: Support,
        vocab_size: int,
        projection_ED: Tensor | None,
        compile: Literal["auto", "on", "off"],
    ):
        super().__init__()
        self.student = student
        self.objective = objective
        self.support: Support = support
        self.vocab_size = vocab_size
        self.compile_body: Literal["auto", "on", "off"] = compile
        self.projection_ED = None if projection_ED is None else nn.Parameter(projection_ED)
        names = part_names(leaves(objective))
        self._measured = support != "sampled" and any("teacher" in part.reads for _, part in row_leaves(objective))
        self.stats: tuple[str, ...] = ("loss",)
        if len(names) > 1:
            self.stats += tuple(f"loss/{name}" for name in names)
        if self._measured:
            self.stats += measured_on(support)

    def forward(
        self, batch: TokenBatch, signal: Signal | None, weight_N: Tensor, moment: Moment
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the per-token values, and the plain sums of `stats` over the tokens (detached).

        Args:
            signal: None leaves objective and teacher out: the cross-entropy of the labels, which tells whether the
                student still computes.
        """
        hidden_ND = hidden_states(self.student, batch)
        head = head_of(self.student, self.vocab_size, verify=False)
        if signal is None:
            alone = fused_distillation_loss(
                hidden_ND, head, None, CrossEntropy(), weight_N=weight_N, label_N=batch.labels_N, compile="off"
            )
            return alone.loss, alone.value_N
        pairs = ()
        if self.projection_ED is not None:
            assert isinstance(signal, DenseSignal), "the projection was made from one"
            pairs = (HiddenPair(student_ND=hidden_ND, teacher_NE=signal.hidden_ND, projection_ED=self.projection_ED),)
        out = fused_distillation_loss(
            hidden_ND,
            head,
            signal,
            self.objective,
            temperature=moment.temperature,
            support=self.support if isinstance(signal, TopKSignal) else None,
            weight_N=weight_N,
            label_N=batch.labels_N,
            sequence_N=batch.sequence_N,
            hidden_pairs=pairs,
            token_options={name: torch.full_like(weight_N, value) for name, value in moment.options.items()},
            measure=self._measured,
            compile=self.compile_body,
        )
        found = (
            {"loss": out.value_N}
            | {f"loss/{name}": value_N for name, value_N in out.parts.items()}
            | dict(out.measures)
        )
        return out.loss, torch.stack([found[name].detach().float().sum() for name in self.stats])


def make_projection(
    student: nn.Module,
    objective: AnyObjective,
    teacher: Teacher,
    responses: Sequence[Response],
    *,
    vocab_size: int,
    pad_id: int,
    seed: int,
) -> Tensor | None:
    """A projection (teacher width, student width) where an objective compares hidden states of two widths.

    It begins as a random matrix that keeps lengths on average, from the seed alone.
    """
    if "hidden" not in objective.reads:
        return None
    signal = teacher.signal(collate(responses, (0,), pad_id=pad_id))
    weight_VD = head_of(student, vocab_size, verify=False).weight_VD
    if not isinstance(signal, DenseSignal) or signal.hidden_ND.shape[1] == weight_VD.shape[1]:
        return None
    shape = (signal.hidden_ND.shape[1], weight_VD.shape[1])
    generator = torch.Generator().manual_seed(seed)
    projection_ED = torch.randn(shape, generator=generator) * shape[0] ** -0.5
    return projection_ED.to(weight_VD.device, weight_VD.dtype)
