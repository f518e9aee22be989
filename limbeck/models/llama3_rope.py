"""The rope of Llama 3.1 and later: slow frequencies are divided by a factor, so that windows can be longer.

llama.cpp has a divisor for each frequency as a tensor of the file, from which the settings behind it cannot be read.
limbeck writes these beside it; of files by others the settings that all of Meta's models have are tried.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter
    from numpy import ndarray

TENSOR = "rope_freqs.weight"
_PLACE = "limbeck.rope."
_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Of every Llama from 3.1 on, beside its factor.
_METAS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Divisors are float32.
_ROUNDING = 1e-4


def is_scaled(config: Any) -> bool:
    """Whether a configuration has this rope."""
    return (config.rope_parameters or {}).get("rope_type") == "llama3"


def divisors(config: Any) -> ndarray:
    """What each frequency of a head is divided by, as llama.cpp has it: (half of the head's size), float32."""
    import numpy as np

    rope = config.rope_parameters
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    made = [_divisor(_settings(config), rope["rope_theta"] ** (place / size)) for place in range(0, size, 2)]
    return np.array(made, dtype=np.float32)


def _settings(config: Any) -> dict[str, float]:
    """Of the scaling; without a window of its own it is of the model's."""
    rope = {"original_max_position_embeddings": config.max_position_embeddings} | config.rope_parameters
    return {name: rope[name] for name in _FIELDS}


def _divisor(settings: dict[str, float], slowness: float) -> float:
    """Of one frequency: 1 for fast ones, `factor` for slow ones, and what lies between by how often it turns."""
    factor, low, high, window = settings.values()
    turns = window / (2 * math.pi * slowness)
    if turns >= high:
        return 1.0
    if turns <= low:
        return factor
    share = (turns - low) / (high - low)
    return 1 / ((1 - share) / factor + share)


def write_scaling(writer: GGUFWriter, config: Any) -> None:
    """Write the divisors, for llama.cpp, and what they are made of."""
    for name, value in _settings(config).items():
        writer.add_float64(f"{_PLACE}{name}", float(value))
    writer.add_tensor(TENSOR, divisors(config))


def restore_scaling(path: Path, config: Any) -> None:
    """Put the rope of a GGUF file into its configuration, in place: transformers passes over the divisors.

    Raises:
        LimbeckError: they are of a rope that is not known here.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    found = next((tensor.data for tensor in reader.tensors if tensor.name == TENSOR), None)
    if found is None or bool((found == 1).all()):
        return
    settings = _written(reader) or {"factor": float(found.max()), **_METAS}
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], "rope_type": "llama3"} | settings
    made = divisors(config)
    if made.shape != found.shape or not bool((abs(made - found) <= _ROUNDING * abs(found)).all()):
        raise LimbeckError(
            f"{path} scales its rope ({TENSOR}) in another way than Llama 3.1 and later; use the safetensors directory "
            "or the hub id of the same model"
        )


def _written(reader: GGUFReader) -> dict[str, float] | None:
    """The settings in a file that limbeck wrote."""
    fields = [reader.fields.get(f"{_PLACE}{name}") for name in _FIELDS]
    if any(field is None for field in fields):
        return None
    values = [float(field.parts[field.data[0]][0]) for field in fields if field is not None]
    settings: dict[str, float] = dict(zip(_FIELDS, values, strict=True))
    return settings | {"original_max_position_embeddings": int(settings["original_max_position_embeddings"])}
