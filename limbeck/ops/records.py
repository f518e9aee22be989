"""Records of tensors, such as batches and signals, with each of their tensors changed: moved, copied, pinned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


def with_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """A dataclass with its tensors changed; what is no tensor itself, such as a head, stays as it is."""
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    changed = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(record, **changed)  # type: ignore[type-var]
