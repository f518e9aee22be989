"""Cross-entropy on labels, and weighted sums of objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from limbeck.objectives.base import HiddenObjective, Objective, Rows
from limbeck.objectives.divergences import ANY_SUPPORT, ForwardKL
from limbeck.objectives.temperature import scaled
from limbeck.types import LimbeckError

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """-log q(label) at temperature 1: the label is the token that followed. No teacher.

    The temperature and its factor do not touch it, nor does the support of the teacher's signal: it always sees the
    student's whole row. Labels of -100 count as zero.
    """

    name = "ce"
    order = None
    reads = frozenset({"labels"})
    supports = ANY_SUPPORT | {"sampled"}
    token_fields = frozenset()
    caution = ""

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        counts_N1, label_N1, at_label_NV = labels_of(rows)
        log_q_NV = rows.student_logits_NK.log_softmax(-1)
        value_N = torch.where(counts_N1, -log_q_NV.gather(-1, label_N1), 0.0).squeeze(-1)
        return value_N, torch.where(counts_N1, log_q_NV.exp() - at_label_NV, 0.0)


def labels_of(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Of labels: which count (bool), an index for each (0 where it does not count), and 1 at the index, 0 elsewhere."""
    assert rows.label_N is not None, "checked where the loss is called: labels are there"
    logits_NV = rows.student_logits_NK
    counts_N1 = (rows.label_N != IGNORED).unsqueeze(-1)
    label_N1 = torch.where(counts_N1, rows.label_N.unsqueeze(-1), 0)
    at_label_NV = torch.arange(logits_NV.shape[-1], device=logits_NV.device) == label_N1
    return counts_N1, label_N1, at_label_NV.to(logits_NV.dtype)


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """sum_i c_i D_i on the same tokens, in one pass: each part with the factor its own order asks for.

    Attributes:
        parts: (weight, objective) pairs. In a recipe: `parts: [{name: fkl, weight: 0.5}, {name: ce, weight: 0.5}]`.
    """

    name = "sum"
    order = None

    parts: tuple[tuple[float, Objective | HiddenObjective], ...] = ((1.0, ForwardKL()),)

    def __post_init__(self) -> None:
        if not self.parts:
            raise LimbeckError("sum has no parts: give at least one (weight, objective)")
        for weight, part in self.parts:
            if not math.isfinite(weight):
                raise LimbeckError(f"sum part {part.name!r} has weight {weight}: expected a finite number")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset[str]().union(*(part.reads for _, part in self.parts))

    @property
    def supports(self) -> frozenset[str]:
        return reduce(
            frozenset.intersection, (part.supports for _, part in row_leaves(self)), ANY_SUPPORT | {"sampled"}
        )

    @property
    def token_fields(self) -> frozenset[str]:
        return frozenset[str]().union(*(part.token_fields for _, part in row_leaves(self)))

    @property
    def caution(self) -> str:
        return ""

    def value_and_grad(self, rows: Rows) -> tuple[Tensor, Tensor]:
        assert "hidden" not in self.reads, "objectives on hidden states are computed elsewhere"
        scaled_parts = [(weight, *scaled(part, rows)) for weight, part in row_leaves(self)]
        value_N = torch.stack([weight * value_N for weight, value_N, _ in scaled_parts]).sum(0)
        grad_NK = reduce(torch.add, (weight * grad_NK for weight, _, grad_NK in scaled_parts))
        return value_N, grad_NK


AnyObjective = Objective | HiddenObjective


def leaves(objective: AnyObjective, weight: float = 1.0) -> Iterator[tuple[float, AnyObjective]]:
    """The parts of nested sums, with their weights multiplied out."""
    if isinstance(objective, WeightedSum):
        for inner, part in objective.parts:
            yield from leaves(part, weight * inner)
    else:
        yield weight, objective


def row_leaves(objective: AnyObjective) -> Iterator[tuple[float, Objective]]:
    """The leaves that compare rows of logits."""
    for weight, part in leaves(objective):
        if isinstance(part, Objective):
            yield weight, part


def hidden_leaves(objective: AnyObjective) -> Iterator[tuple[float, HiddenObjective]]:
    """The leaves that compare hidden states."""
    for weight, part in leaves(objective):
        if isinstance(part, HiddenObjective):
            yield weight, part


def nested(objective: AnyObjective) -> Iterator[AnyObjective]:
    """Every objective inside, at any depth, and itself where it is no sum."""
    if isinstance(objective, WeightedSum):
        inside: list[object] = [part for _, part in objective.parts]
    else:
        yield objective
        inside = [getattr(objective, field.name) for field in fields(objective)]  # pyright: ignore[reportArgumentType]
    for part in inside:
        if isinstance(part, (Objective, HiddenObjective)):
            yield from nested(part)


def part_names(parts: Iterable[tuple[float, AnyObjective]]) -> tuple[str, ...]:
    """The names of parts; one that comes again gets a number."""
    names: list[str] = []
    for _, part in parts:
        again = sum(name.partition(".")[0] == part.name for name in names)
        names.append(f"{part.name}.{again + 1}" if again else part.name)
    return tuple(names)
