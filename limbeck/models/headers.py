"""Headers of safetensors files: names, types and shapes of the weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from limbeck.types import LimbeckError

# How the names of heads and of input embeddings end.
EMBEDDINGS = ("lm_head.weight", "embed_tokens.weight", "wte.weight", "embed_out.weight")


def safetensors_header(path: Path) -> dict[str, Any]:
    """Name of each tensor to its dtype and shape: eight bytes of length, little-endian, then as many of JSON.

    Raises:
        LimbeckError: the file is cut short, or what it opens with is no such header.
    """
    from safetensors import SafetensorError, safe_open

    damaged = LimbeckError(f"{path} is damaged or no safetensors file; download it again")
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8 or (length := struct.unpack("<Q", prefix)[0]) > path.stat().st_size:
            raise LimbeckError(f"{path} is cut short or no safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise damaged from error
    if not isinstance(header, dict):
        raise damaged
    header.pop("__metadata__", None)
    for entry in header.values():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or not isinstance(entry.get("dtype"), str):
            raise damaged
    try:
        with safe_open(path, "pt"):
            # The library's own look at offsets and sizes.
            return header
    except SafetensorError as error:
        raise damaged from error
