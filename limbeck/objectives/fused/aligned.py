"""The loss against a teacher with other tokens: its distribution where the tokens coincide, labels everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from limbeck.objectives.fused.chained import chained_loss
from limbeck.objectives.fused.loss import FusedLoss, fused_distillation_loss
from limbeck.objectives.fused.sorted_rest import sorted_rest_loss
from limbeck.objectives.hidden_matching import HiddenPair
from limbeck.objectives.sums import AnyObjective, WeightedSum, hidden_leaves, part_names, row_leaves
from limbeck.types import Head, SharedSignal


def aligned_distillation_loss(
    student_hidden_ND: Tensor,
    student_head: Head,
    signal: SharedSignal,
    objective: AnyObjective,
    *,
    weight_N: Tensor,
    label_N: Tensor,
    sequence_N: Tensor | None = None,
    hidden_pairs: Sequence[HiddenPair] = (),
    token_options: Mapping[str, Tensor] | None = None,
    sorted_weight: float = 0.0,
    **settings: Any,
) -> FusedLoss:
    """The loss at the positions that are aligned, and of groups of tokens; elsewhere only what reads labels alone.

    Where all are aligned it is `fused_distillation_loss`, which documents the other arguments. Values and measures of
    the other positions are zero.

    Args:
        sorted_weight: of the distance by rank between the tokens that only one side has (`sorted_rest_loss`), which is
            added and measured as `sorted_distance`.
    """
    keep_N = signal.aligned_N.to(weight_N.device)
    inside = slice(None) if bool(keep_N.all()) else keep_N
    kept = signal if isinstance(inside, slice) else signal.rows(keep_N)
    found = fused_distillation_loss(
        student_hidden_ND[inside],
        student_head,
        kept,
        objective,
        weight_N=weight_N[inside],
        label_N=label_N[inside],
        sequence_N=None if sequence_N is None else sequence_N[inside],
        hidden_pairs=tuple(
            replace(pair, student_ND=pair.student_ND[inside], teacher_NE=pair.teacher_NE[inside])
            for pair in hidden_pairs
        ),
        token_options={name: option_N[inside] for name, option_N in (token_options or {}).items()},
        **settings,
    )
    if sorted_weight:
        more = sorted_rest_loss(student_hidden_ND[inside], student_head, kept, weight_N=weight_N[inside])
        found = _with_sorted(found, *more, sorted_weight)
    if isinstance(inside, slice):
        return found

    given = (weight_N, label_N, token_options or {})

    def spread(value_K: Tensor) -> Tensor:
        return value_K.new_zeros(keep_N.shape).masked_scatter(keep_N, value_K)

    whole = FusedLoss(
        loss=found.loss,
        value_N=spread(found.value_N),
        parts={name: spread(value_K) for name, value_K in found.parts.items()},
        measures={name: spread(value_K) for name, value_K in found.measures.items()},
    )
    if signal.group_N is not None and bool((signal.group_N >= 0).any()):
        whole = _with_groups(whole, student_hidden_ND, student_head, signal, objective, given)
    return _with_labels(whole, student_hidden_ND, student_head, objective, ~keep_N, given)


def _with_sorted(found: FusedLoss, loss: Tensor, value_K: Tensor, weight: float) -> FusedLoss:
    """A loss with the distance by rank of what only one side has."""
    value_K = value_K.to(found.value_N.dtype)
    return replace(
        found,
        loss=found.loss + weight * loss,
        value_N=found.value_N + weight * value_K,
        measures={**found.measures, "sorted_distance": value_K},
    )


def _with_groups(
    found: FusedLoss,
    hidden_ND: Tensor,
    head: Head,
    signal: SharedSignal,
    objective: AnyObjective,
    given: tuple[Tensor, Tensor, Mapping[str, Tensor]],
) -> FusedLoss:
    """A loss with that of groups of tokens.

    Args:
        given: weights, labels and token options.
    """
    weight_N, label_N, token_options = given
    assert signal.group_N is not None and signal.group_logp_G is not None, "they come together"
    inside_N = (signal.group_N >= 0).to(weight_N.device)
    # Of some rows of a batch the groups are numbered anew.
    kept, group_K = signal.group_N.to(weight_N.device)[inside_N].unique(return_inverse=True)
    loss, value_K = chained_loss(
        hidden_ND[inside_N],
        head,
        objective,
        group_K,
        signal.group_logp_G.to(weight_N.device)[kept],
        label_N=label_N[inside_N],
        weight_N=weight_N[inside_N],
        token_options={name: option_N[inside_N] for name, option_N in token_options.items()},
    )
    value_N = found.value_N.masked_scatter(inside_N, value_K.to(found.value_N.dtype))
    return replace(found, loss=found.loss + loss, value_N=value_N)


def labels_alone(objective: AnyObjective) -> dict[str, tuple[float, Any]]:
    """The parts of an objective that read labels and nothing else, by the name that they have in it."""
    every = (*row_leaves(objective), *hidden_leaves(objective))
    return {
        name: (weight, part)
        for name, (weight, part) in zip(part_names(every), every, strict=True)
        if part.reads == frozenset({"labels"})
    }


def _with_labels(
    found: FusedLoss,
    hidden_ND: Tensor,
    head: Head,
    objective: AnyObjective,
    outside_N: Tensor,
    given: tuple[Tensor, Tensor, Mapping[str, Tensor]],
) -> FusedLoss:
    """A loss with what the labels add at the other positions.

    Args:
        given: weights, labels and token options.
    """
    weight_N, label_N, token_options = given
    parts = labels_alone(objective)
    if not parts:
        return found
    known = frozenset[str]().union(*(part.token_fields for _, part in parts.values()))
    more = fused_distillation_loss(
        hidden_ND[outside_N],
        head,
        None,
        WeightedSum(parts=tuple(parts.values())),
        weight_N=weight_N[outside_N],
        label_N=label_N[outside_N],
        token_options={
            name: option_N[outside_N] for name, option_N in token_options.items() if name.rpartition(".")[2] in known
        },
        compile="off",
    )

    def added(value_N: Tensor, value_K: Tensor) -> Tensor:
        return value_N.masked_scatter(outside_N, value_N[outside_N] + value_K.to(value_N.dtype))

    by_part = dict(zip(parts, more.parts.values(), strict=True))
    return replace(
        found,
        loss=found.loss + more.loss,
        value_N=added(found.value_N, more.value_N),
        parts={name: added(v, by_part[name]) if name in by_part else v for name, v in found.parts.items()},
    )
