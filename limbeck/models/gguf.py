"""GGUF files as ordinary models: dequantised once, in memory, free of any trace of quantisation."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.models.gguf_header import Header, complete, read_header
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"
_State = tuple[Path, int, int]
# Read into the configuration, not into the model.
_OF_THE_ROPE = {"rope_freqs.weight"}
# Architectures whose tensors newer transformers convert in another way, which has no list of them.
_BY_OTHER_NAMES = {"qwen35", "qwen35moe", "lfm2"}


def is_gguf(path: Path) -> bool:
    """Whether the file opens with GGUF's magic bytes."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer a GGUF file carries."""
    return copy.deepcopy(_tokenizer(_state(path)))


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration a GGUF file carries, without the mark of its quantisation. Reads no weights."""
    return copy.deepcopy(_config(_state(path)))


@lru_cache(maxsize=4)
def _tokenizer(state: _State) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, read once: the lists of a vocabulary of 150,000 tokens take transformers 15 seconds."""
    from transformers import AutoTokenizer

    path = state[0]
    return _converted(path, lambda: AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name))


@lru_cache(maxsize=4)
def _config(state: _State) -> PretrainedConfig:
    """The configuration of a file, read once: transformers reads the tokenizer's lists for it too."""
    from transformers import AutoConfig

    path, header = state[0], _header(state)

    def load() -> PretrainedConfig:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        complete(config, header)
        return _unmarked(config)

    return _converted(path, load)


@lru_cache(maxsize=4)
def _header(state: _State) -> Header:
    """The header of a file, read once."""
    return _converted(state[0], lambda: read_header(state[0]))


def _state(path: Path) -> _State:
    """A file as it is now: another one may be written there."""
    try:
        found = path.stat()
    except OSError:
        return path, 0, 0  # said where it is opened
    return path, found.st_mtime_ns, found.st_size


def gguf_model(path: Path, *, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """The model of a GGUF file with plain `dtype` weights, ready to be trained and saved.

    Raises:
        LimbeckError: broken file, one that lacks weights or has others, or an architecture transformers cannot convert.
    """
    from transformers import AutoModelForCausalLM

    # Handing the configuration in spares transformers a second parse of the file's long token lists.
    config, header = gguf_config(path), _header(_state(path))

    def load() -> PreTrainedModel:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            config=config,
            gguf_file=path.name,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **_whole_dequantisation(),
        )
        model, info = loaded
        _require_whole(model, header, info["missing_keys"])
        _unmarked(model.config)
        return model.eval()

    return _converted(path, load)


def _require_whole(model: PreTrainedModel, header: Header, missing: Collection[str]) -> None:
    """Refuse a model that is not the file's: transformers gives what the file lacks random weights, and goes on.

    It passes over tensors that the model has no place for, too.
    """
    if missing:
        raise LimbeckError(
            f"{header.path} lacks {len(missing)} of the model's weights ({min(missing)}, ...), or has them in a form "
            "that is not converted; download it again, or use the safetensors directory or the hub id of the same model"
        )
    if unplaced := sorted(header.tensors - _places(model, header) - _OF_THE_ROPE):
        raise LimbeckError(
            f"{header.path} has {len(unplaced)} weights for which {type(model).__name__} has no place "
            f"({unplaced[0]}, ...); use the safetensors directory or the hub id of the same model"
        )


def _places(model: PreTrainedModel, header: Header) -> frozenset[str]:
    """The tensors of a file that transformers takes."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if header.architecture in _BY_OTHER_NAMES:
        return header.tensors
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config={})
    found = get_gguf_hf_weights_map(model, processor)
    # All experts of a layer are one tensor, whose name there has no suffix.
    return frozenset(name for name in header.tensors if name in found or name.endswith("_exps.weight"))


def gguf_tensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Some tensors of a GGUF file by their names there, dequantised; no other is read. Those it lacks are left out.

    They are as transformers has them after it has converted the file: some architectures' norms are stored plus one.
    """

    def load() -> dict[str, Tensor]:
        import numpy as np
        import torch
        from gguf import GGUFReader, dequantize
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, read_field

        reader = GGUFReader(path)
        architecture = read_field(reader, "general.architecture")[0]
        processor = TENSOR_PROCESSORS.get(str(architecture), TensorProcessor)(config={})
        found = {}
        for tensor in reader.tensors:
            if tensor.name in names:
                numbers = dequantize(tensor.data, tensor.tensor_type)
                made = processor.process(weights=numbers, name=tensor.name, tensor_key_mapping={}, parsed_parameters={})
                found[tensor.name] = torch.from_numpy(np.copy(made.weights))
        return found

    return _converted(path, load)


def _unmarked(config: PretrainedConfig) -> PretrainedConfig:
    """A model marked as quantised refuses save_pretrained; the file's title is no model id."""
    for key in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(key, None)
    return config


def _whole_dequantisation() -> dict[str, Any]:
    """Newer transformers keep GGUF blocks packed where a kernel exists, unless asked not to."""
    from transformers.utils import quantization_config

    gguf = quantization_config.__dict__.get("GgufConfig")
    return {} if gguf is None else {"quantization_config": gguf(dequantize=True)}


def _converted(path: Path, load: Any) -> Any:
    if not is_gguf(path):
        raise LimbeckError(f"{path} is no GGUF file (it does not start with {MAGIC.decode()}); give a .gguf file")
    try:
        with quiet_transformers():
            return load()
    except LimbeckError:
        raise
    except Exception as error:  # the Rust tokenizers raise nothing narrower
        raise LimbeckError(
            f"GGUF file {path} cannot be converted: {one_line(error)}; "
            "use the safetensors directory or the hub id of the same model"
        ) from error
