"""Pieces of a group's work: what it finds in one batch of its examples, which any rank of a launch can compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.runtime.files import whole_file
from limbeck.types import Json, Response

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What was found in a batch.

    Attributes:
        record: plain values.
    """

    tensors: Mapping[str, Tensor]
    record: Json = field(default_factory=dict)


def longest_first(responses: Sequence[Response], size: int) -> list[list[int]]:
    """Batches of the places of responses, the longest first."""
    order = sorted(range(len(responses)), key=lambda i: (-responses[i].length, i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def write_piece(path: Path, piece: Piece) -> None:
    """Write a piece, whole or not at all."""
    from safetensors.torch import save_file

    # Copies: two of them may be one in memory, which a file cannot hold.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in piece.tensors.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"record": json.dumps(piece.record)})


def read_piece(path: Path) -> Piece:
    """The piece of `write_piece`, bit for bit."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names, metadata = file.keys(), file.metadata()
        return Piece(tensors={name: file.get_tensor(name) for name in names}, record=json.loads(metadata["record"]))
