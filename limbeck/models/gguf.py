"""GGUF files as ordinary models: dequantised once, in memory, free of any trace of quantisation."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.models.llama3_rope import restore_scaling
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"
_State = tuple[Path, int, int]


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

    path = state[0]

    def load() -> PretrainedConfig:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        if config.model_type == "llama":
            restore_scaling(path, config)
        return _unmarked(config)

    return _converted(path, load)


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
        LimbeckError: broken file, or an architecture transformers cannot convert.
    """
    from transformers import AutoModelForCausalLM

    # Handing the configuration in spares transformers a second parse of the file's long token lists.
    config = gguf_config(path)

    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            config=config,
            gguf_file=path.name,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **_whole_dequantisation(),
        )
        _unmarked(model.config)
        return model.eval()

    return _converted(path, load)


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
