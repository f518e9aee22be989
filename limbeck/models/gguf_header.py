"""The fields of a GGUF file that transformers passes over: put into the configuration, or refused where they cannot be.

Rope and attention scale are as llama.cpp itself reads them: https://github.com/ggml-org/llama.cpp, src/llama-model.cpp.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.models.llama3_rope import TENSOR, restore_scaling
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField

_INSTEAD = "use the safetensors directory or the hub id of the same model"
# The names that configurations have for the number of a layer's experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Fields of a scaled rope; `finetuned` changes nothing.
_SCALING = ("type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow")
# Layers of the 27B models, whose attention llama.cpp scales by the width of the model over its heads.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says before its weights.

    Attributes:
        fields: numbers and texts, without the architecture's name in front; lists are left out.
        tensors: the names of its weights.
    """

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    tensors: frozenset[str]


def read_header(path: Path) -> Header:
    """Read the header of one whole file.

    Raises:
        LimbeckError: the file is a part of a model.
    """
    reader = _without_lists(path)
    every = {name: _value(field) for name, field in reader.fields.items() if len(field.types) == 1}
    if (parts := every.get("split.count", 1)) > 1:
        raise LimbeckError(
            f"{path} is one of the {parts} files of a split model, expected a whole one; "
            "join them: llama-gguf-split --merge FIRST WHOLE"
        )
    architecture = str(every.get("general.architecture", ""))
    fields = {name.removeprefix(f"{architecture}."): value for name, value in every.items()}
    return Header(path, architecture, fields, frozenset(tensor.name for tensor in reader.tensors))


def _without_lists(path: Path) -> GGUFReader:
    """A reader of a file that passes over its lists: those of a tokenizer take seconds, and are not asked for."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            order: Any = sys.byteorder if self.byte_order == "I" else {"little": "big", "big": "little"}[sys.byteorder]
            data: Any = self.data
            view, offset = memoryview(data), orig_offs + 12
            kind = GGUFValueType(int.from_bytes(view[orig_offs : orig_offs + 4], order))
            count = int.from_bytes(view[orig_offs + 4 : offset], order)
            if kind == GGUFValueType.STRING:
                for _ in range(count):
                    offset += 8 + int.from_bytes(view[offset : offset + 8], order)
            elif (scalar := self.gguf_scalar_to_np.get(kind)) is not None:
                offset += count * scalar().itemsize
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return offset - orig_offs, [], [], [GGUFValueType.ARRAY, kind]

    return Reader(path)


def _value(field: ReaderField) -> Any:
    from gguf import GGUFValueType

    found = field.parts[field.data[0]]
    return bytes(found).decode("utf-8", "replace") if field.types == [GGUFValueType.STRING] else found[0].item()


def complete(config: Any, header: Header) -> None:
    """Put what transformers left out into a configuration, in place.

    Raises:
        LimbeckError: the file has experts, a rope or an attention scale that the configuration cannot have.
    """
    experts = header.fields.get("expert_count") or 0
    if experts and not any(config.to_dict().get(name) for name in _EXPERTS):
        raise LimbeckError(
            f"{header.path} has {experts} experts a layer, which transformers cannot convert from GGUF files of "
            f"{header.architecture}; {_INSTEAD}"
        )
    if (layers := _SCALED_BY_WIDTH.get(config.model_type)) is not None:
        by_width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = by_width if config.num_hidden_layers == layers else config.head_dim
    _scale_rope(config, header)
    # Gemma 4 has a kind of rope of its own for them, which its configuration says.
    if TENSOR in header.tensors and "rope_theta" in (config.rope_parameters or {}):
        restore_scaling(header.path, config)


def _scale_rope(config: Any, header: Header) -> None:
    """Put a rope that is scaled by one factor into a configuration, in place: linear, or yarn."""
    place = "rope.scaling."
    scaling = {name.removeprefix(place): value for name, value in header.fields.items() if name.startswith(place)}
    factor = scaling.get("factor") or header.fields.get("rope.scale_linear") or 1.0
    kind = scaling.get("type", "linear")
    plain = kind == "none" or (kind == "linear" and factor == 1)
    # transformers reads the fields of this architecture itself.
    if header.architecture == "gpt-oss" or (plain and not _divisors(header)):
        return
    ropes = config.rope_parameters or {}
    rope = ropes.get("full_attention", ropes)
    known = kind in ("linear", "yarn") and set(scaling) <= set(_SCALING) and not _divisors(header)
    if not known or "rope_theta" not in rope:
        odd = next((name for name in (*scaling, *_divisors(header)) if name not in _SCALING), kind)
        raise LimbeckError(
            f"{header.path} scales its rope in a way that is not converted from GGUF files of {header.architecture} "
            f"({odd}), expected one factor of kind linear or yarn; {_INSTEAD}"
        )
    rope |= {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        window = scaling.get("original_context_length") or config.max_position_embeddings
        betas = {
            name: float(scaling[f"yarn_{name}"]) for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in scaling
        }
        rope |= {"original_max_position_embeddings": int(window)} | betas


def _divisors(header: Header) -> list[str]:
    """The divisors of each frequency for windows of several lengths."""
    return sorted(name for name in header.tensors if name.startswith("rope_factors_"))
