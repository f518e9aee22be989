"""Tokens that a model was never trained on, by their rows of its embeddings; no other weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from limbeck.models.headers import EMBEDDINGS, safetensors_header
from limbeck.models.sources import Source

if TYPE_CHECKING:
    from torch import Tensor

# A row that is so much shorter than the usual one, or as near to that of another unused token, was not trained.
# Llama 3 keeps its reserved tokens near 0; in SmolLM2 they differ from one another by 0.3 % of their length and from
# <|im_end|>, which is used, by 12 %.
_SHORT, _NEAR = 0.1, 0.01
_SAMPLED = 256


def untrained_tokens(source: Source, tokens: Mapping[int, str], control: Iterable[int], known: int) -> tuple[str, ...]:
    """Those of `tokens` (id to spelling) whose row of a head or an input embedding was never trained.

    Args:
        control: ids of the model's control tokens, most of which are unused.
        known: ids of the model's own tokenizer; rows from there on were padding.
    """
    found = {token for index, token in tokens.items() if index >= known}
    for path, name in _matrices(source.directory) if source.gguf is None else ():
        found |= {tokens[index] for index in _untrained_in(path, name, set(tokens), set(control))}
    return tuple(token for token in tokens.values() if token in found)


def _matrices(folder: Path) -> list[tuple[Path, str]]:
    """File and name of every head and input embedding."""
    return [
        (path, name)
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in safetensors_header(path).items()
        if name.endswith(EMBEDDINGS) and len(entry["shape"]) == 2
    ]


def _untrained_in(path: Path, name: str, asked: set[int], control: set[int]) -> set[int]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        matrix = file.get_slice(name)
        rows = matrix.get_shape()[0]

        def read(ids: Iterable[int]) -> dict[int, Tensor]:
            return {index: matrix[index : index + 1][0].float() for index in ids if index < rows}

        usual = torch.stack(list(read(range(0, rows, max(1, rows // _SAMPLED))).values())).norm(dim=1).median()
        special = read(asked | control)
    found = set()
    for index in asked & special.keys():
        length = special[index].norm()
        gaps = [(special[other] - special[index]).norm() for other in special if other != index]
        if length <= _SHORT * usual or (gaps and min(gaps) <= _NEAR * length):
            found.add(index)
    return found
