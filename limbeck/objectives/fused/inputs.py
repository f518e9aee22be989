"""Checks of all inputs per token: weights, temperatures, labels, options, the rows of a sparse signal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from limbeck.objectives.base import Objective
from limbeck.objectives.fused.projection import Projection
from limbeck.objectives.sums import IGNORED, WeightedSum, nested
from limbeck.objectives.support import Columns, signal_columns
from limbeck.objectives.temperature import Temperature
from limbeck.types import DenseSignal, LimbeckError, SharedSignal, Signal, Support


def token_weights(weight_N: Tensor | None, tokens: int, student: Projection) -> Tensor:
    """The weights of the tokens in the working dtype; 1/N where none are given."""
    device = student.weight_VD.device
    if weight_N is None:
        return torch.full((tokens,), 1.0 / max(tokens, 1), dtype=student.dtype, device=device)
    _one_a_token("weight_N", weight_N, tokens)
    return weight_N.detach().to(device=device, dtype=student.dtype)


def weighted(weight_N: Tensor, value_N: Tensor) -> Tensor:
    """Sum of weight times value. A token of weight zero is left out, whatever its value."""
    return torch.where(weight_N == 0, 0.0, weight_N * value_N).sum()


def token_columns(
    student: Projection,
    weight_N: Tensor,
    temperature: Temperature,
    signal: Signal | None,
    support: Support,
    objective: Objective,
) -> Columns:
    """Weights, temperatures and, of a sparse signal, its rows."""
    student_tau_N1, teacher_tau_N1 = temperature.columns(weight_N.shape[0], student.dtype, weight_N.device)
    columns = {"student_tau": student_tau_N1, "teacher_tau": teacher_tau_N1, "weight": weight_N.unsqueeze(-1)}
    if signal is None or isinstance(signal, DenseSignal | SharedSignal):
        return columns
    return columns | signal_columns(signal, support, teacher_tau_N1, student.vocab_size)


def label_columns(label_N: Tensor | None, weight_N: Tensor, vocab_size: int) -> Columns:
    """The labels, checked."""
    assert label_N is not None, "the door asks for them"
    _one_a_token("label_N", label_N, weight_N.shape[0])
    label_N = label_N.detach().to(device=weight_N.device, dtype=torch.int64)
    wrong_N = (label_N >= vocab_size) | ((label_N < 0) & (label_N != IGNORED))
    if bool(wrong_N.any()):
        raise LimbeckError(
            f"label {int(label_N[wrong_N][0])} is no token: expected 0 to {vocab_size - 1}, or {IGNORED}"
        )
    return {"label": label_N}


def option_columns(objective: WeightedSum, options: Mapping[str, Tensor], weight_N: Tensor) -> Columns:
    """Token options under the names that the objective has."""
    known: dict[str, list[Any]] = {}
    for part in nested(objective):
        for field in fields(cast(Any, part)):
            if isinstance(part, Objective) and field.name in part.token_fields:
                for name in (field.name, f"{part.name}.{field.name}"):
                    known.setdefault(name, []).append(part)
    columns = {}
    for name, option_N in options.items():
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise LimbeckError(f"token option {name!r} is unknown to this objective: {has}")
        _one_a_token(f"token option {name!r}", option_N, weight_N.shape[0])
        if option_N.numel():
            for part in known[name]:
                # The objective knows its own range: it refuses the ends if it would refuse them as a number.
                for end in (float(option_N.min()), float(option_N.max())):
                    replace(part, **{name.rpartition(".")[2]: end})
        columns[f"option.{name}"] = option_N.detach().to(device=weight_N.device, dtype=weight_N.dtype)
    return columns


def _one_a_token(name: str, column: Tensor, tokens: int) -> None:
    if column.shape != (tokens,):
        raise LimbeckError(f"{name} has shape {tuple(column.shape)}: expected ({tokens},), one per token")
