"""Everything that comes one a token, checked: weights, temperatures, labels, options, the rows of a sparse signal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from limbeck.flow import DenseSignal, LimbeckError, Objective, Signal, Support
from limbeck.objectives.heads import Projection
from limbeck.objectives.sums import IGNORED, WeightedSum, row_leaves
from limbeck.objectives.support import Columns, signal_columns
from limbeck.objectives.temperature import Temperature


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
    if signal is None or isinstance(signal, DenseSignal):
        return columns
    return columns | signal_columns(signal, support, teacher_tau_N1, student.vocab_size)


def label_columns(objective: Objective, label_N: Tensor | None, weight_N: Tensor, vocab_size: int) -> Columns:
    """The labels, where the objective reads them."""
    if "labels" not in objective.reads or label_N is None:
        return {}
    _one_a_token("label_N", label_N, weight_N.shape[0])
    label_N = label_N.detach().to(device=weight_N.device, dtype=torch.int64)
    wrong_N = (label_N >= vocab_size) | ((label_N < 0) & (label_N != IGNORED))
    if bool(wrong_N.any()):
        raise LimbeckError(
            f"label {int(label_N[wrong_N][0])} is no token: expected 0 to {vocab_size - 1}, or {IGNORED}"
        )
    return {"label": label_N}


def option_columns(objective: WeightedSum, options: Mapping[str, Tensor], weight_N: Tensor) -> Columns:
    """Options given a token, under the names the objective knows."""
    known = [name for _, part in row_leaves(objective) for f in part.token_fields for name in (f, f"{part.name}.{f}")]
    columns = {}
    for name, option_N in options.items():
        if name not in known:
            has = f"it has {', '.join(sorted(set(known)))}" if known else "it has none"
            raise LimbeckError(f"token option {name!r} is unknown to this objective: {has}")
        _one_a_token(f"token option {name!r}", option_N, weight_N.shape[0])
        share = not name.endswith("tail_weight")
        if not bool(((option_N >= 0) & ((option_N <= 1) | (not share))).all()):
            raise LimbeckError(f"token option {name!r} out of range: expected {'[0, 1]' if share else 'zero or more'}")
        columns[f"option.{name}"] = option_N.detach().to(device=weight_N.device, dtype=weight_N.dtype)
    return columns


def _one_a_token(name: str, column: Tensor, tokens: int) -> None:
    if column.shape != (tokens,):
        raise LimbeckError(f"{name} has shape {tuple(column.shape)}: expected ({tokens},), one a token")
