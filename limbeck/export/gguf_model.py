"""A model as a GGUF file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Norms and biases stay float32, as llama.cpp's own converter has it; so do matrices whose rows no format's blocks divide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from limbeck.export.encoding import Encoding
from limbeck.export.gguf_tokens import Vocabulary
from limbeck.models.gguf_architectures import ARCHITECTURES, require_known
from limbeck.models.llama3_rope import is_scaled, write_scaling
from limbeck.models.quantization import FORMATS
from limbeck.student.endings import stop_ids
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap
    from numpy import ndarray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LICENCE = "general.license"


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    encoding: Encoding,
    license: str | None,
) -> None:
    """Write one file.

    Args:
        license: a hub licence id.

    Raises:
        LimbeckError: an architecture, an option of one, or a tokenizer that is not known here.
    """
    import gguf

    config: Any = model.config
    require_known(config)
    vocabulary = Vocabulary.of(tokenizer, config.vocab_size, stop_ids(model))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_type("model")
    writer.add_name(name)
    if license is not None:
        writer.add_license(license)
    _shape(writer, config)
    writer.add_file_type(_file_type(encoding.dtype))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.write(writer)
    for tensor_name, weight, kind in _tensors(model, encoding):
        writer.add_tensor(tensor_name, weight, raw_dtype=kind)
    if is_scaled(config):
        write_scaling(writer, config)
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
    except (OverflowError, struct.error) as error:
        raise LimbeckError(
            f"config.json holds a number that no field of a GGUF file can hold ({error}); correct it, or export to "
            "safetensors"
        ) from error
    else:
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _shape(writer: GGUFWriter, config: Any) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: PreTrainedModel, encoding: Encoding) -> Iterator[tuple[str, ndarray, Any]]:
    """Every weight under llama.cpp's name, as it is written, with its type."""
    config: Any = model.config
    rotated = rotated_heads(config)
    for own, weight in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = llama_cpp_name(config, own)
        heads = rotated.get(name.split(".")[-2])
        format, stored = encoding.blocks.get(own, (None, weight))
        ordered = stored if heads is None else in_pairs(stored, heads)
        yield name, *_encoded(ordered, format or encoding.floats, packed=format is not None)


def llama_cpp_name(config: Any, own: str) -> str:
    """llama.cpp's name of a weight.

    Raises:
        LimbeckError: its architecture has no place for it.
    """
    names = _tensor_names(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    name = names.get_name(own, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise LimbeckError(
            f"llama.cpp's {config.model_type} has no place for {own}, expected weights of that architecture alone; "
            "export safetensors"
        )
    return name


@cache
def _tensor_names(architecture: str, blocks: int) -> TensorNameMap:
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], blocks)


def rotated_heads(config: Any) -> dict[str, int]:
    """Heads of the weights whose rows llama.cpp has in another order, by the last part of their names."""
    if config.model_type != "llama":
        return {}
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of llama.cpp's rope for Llama: it turns neighbours (2i, 2i + 1), transformers (i, i + half)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _encoded(weight: Tensor, dtype: str, *, packed: bool) -> tuple[ndarray, Any]:
    """A weight as it is written, and its type.

    Args:
        dtype: of the floats, or the name of the format of what is packed already.
    """
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    if packed:
        return weight.contiguous().numpy(), Kind[FORMATS[dtype].gguf or ""]
    kinds = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}
    kind = kinds[dtype] if weight.ndim > 1 else Kind.F32
    return quants.quantize(weight.to(torch.float32).contiguous().numpy(), kind), kind


def _file_type(dtype: str) -> int:
    from gguf import LlamaFileType as File

    types = {
        "float32": File.ALL_F32,
        "float16": File.MOSTLY_F16,
        "bfloat16": File.MOSTLY_BF16,
        "q4_0": File.MOSTLY_Q4_0,
        "q5_0": File.MOSTLY_Q5_0,
        "q8_0": File.MOSTLY_Q8_0,
        "q4_k": File.MOSTLY_Q4_K_S,
        "q6_k": File.MOSTLY_Q6_K,
    }
    return int(types[dtype])
