"""Fidelity beside a teacher that says its likeliest tokens alone: bounds that hold, the values where all are said."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from limbeck.evaluation.fidelity import measure
from limbeck.evaluation.scores.metrics import METRICS
from limbeck.evaluation.token_metrics.likeliest_teacher import LIKELIEST, LikeliestChunk, values_beside_likeliest
from limbeck.evaluation.token_metrics.tokens import FidelityChunk, fidelity_values
from limbeck.evaluation.token_metrics.values import Chunk
from limbeck.models.heads import project
from limbeck.objectives import topk_signal
from limbeck.types import LimbeckError
from tests.evaluation.fidelity_cases import chunk

# What bounds what, and on which side.
BOUNDS = {
    "forward_kl_at_least": ("forward_kl", -1),
    "reverse_kl_at_least": ("reverse_kl", -1),
    "jensen_shannon_at_least": ("jensen_shannon", -1),
    "acceptance_at_least": ("acceptance", -1),
    "acceptance_at_most": ("acceptance", 1),
    "teacher_entropy_at_least": ("teacher_entropy", -1),
    "teacher_nll_at_least": ("teacher_nll", -1),
}


def beside(made: FidelityChunk, k: int) -> LikeliestChunk:
    """The same with the teacher's k likeliest tokens."""
    signal = topk_signal(project(made.teacher.head, made.teacher.hidden_ND), k)
    shared: dict[str, Any] = {field.name: getattr(made, field.name) for field in fields(Chunk)}
    return LikeliestChunk(teacher=signal, **shared)


def values_of(made: FidelityChunk | LikeliestChunk, top_k: int) -> dict[str, torch.Tensor]:
    if isinstance(made, LikeliestChunk):
        found = values_beside_likeliest(made, top_k=top_k)
    else:
        found = fidelity_values(made, top_k=top_k, compile="off")
    return dict(zip(found.names, found.values_MN, strict=True))


@pytest.mark.parametrize("k", [4, 12])
def test_every_bound_holds_at_every_token(k: int) -> None:
    made = chunk(lengths=(60, 40), V=301)
    whole, found = values_of(made, 3), values_of(beside(made, k), 3)
    assert set(found) == set(LIKELIEST) <= set(METRICS)
    for name, (bounded, side) in BOUNDS.items():
        assert (side * (found[name] - whole[bounded]) >= -1e-5).all(), name
        # Bounds, not the values: the labels are mostly not among those that are said.
        assert (found[name] - whole[bounded]).abs().max() > 1e-3, name
    for name in ("top1_agreement", "topk_agreement", "student_nll"):
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6)


def test_of_all_tokens_a_bound_is_the_value() -> None:
    made = chunk(lengths=(9,), V=29)
    whole, found = values_of(made, 5), values_of(beside(made, 29), 5)
    for name, (bounded, _) in BOUNDS.items():
        torch.testing.assert_close(found[name], whole[bounded], rtol=1e-5, atol=2e-6, msg=name)


def test_rows_curves_and_positions_are_named_as_bounds() -> None:
    made = beside(chunk(), 6)
    found = measure([made], top_k=3)
    assert set(found.rows[0].values) == set(LIKELIEST) and set(found.rows[0].sums) == {"student_ece", "teacher_ece"}
    assert set(found.detail["reliability"]) == {"student_ece", "teacher_ece"}
    assert "forward_kl_at_least" in found.detail["by_position"][0]


def test_more_agreement_than_is_said_is_refused() -> None:
    with pytest.raises(LimbeckError, match=r"set evaluate.groups.fidelity.top_k=5, or raise teacher.support_k"):
        values_of(beside(chunk(), 6), 6)
