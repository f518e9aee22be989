"""A model without its weights, for questions about its modules and sizes, without their memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from limbeck.models.fingerprints import weight_files
from limbeck.models.heads import head_of
from limbeck.models.loading import source_config, without_dropout
from limbeck.models.processors import auto_class
from limbeck.models.quiet import quiet_transformers
from limbeck.models.sources import Source
from limbeck.types import Head

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def skeleton_of(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a model on torch's meta device, with its configuration and its settings of generation.

    Raises:
        LimbeckError: as `limbeck.models.loading.load_model`, of the configuration.
    """
    from transformers import GenerationConfig

    config = without_dropout(source_config(source, trust_remote_code=trust_remote_code))
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
        if source.gguf is None:
            # As from_pretrained: a model without the file has what its configuration says.
            with suppress(OSError):
                model.generation_config = GenerationConfig.from_pretrained(source.directory)
    return model


def stored_head(source: Source, skeleton: PreTrainedModel, vocab_size: int, dtype: torch.dtype) -> Head | None:
    """The output head alone, read from the safetensors files as loading the model would have it.

    It is not verified on tokens, as in `head_of`: the code that took the hidden states has done that.

    Returns:
        None where the files have no tensor of its name, as in a GGUF file.
    """
    head = head_of(skeleton, vocab_size, verify=False)
    weight_VD = _stored(source, skeleton, head.weight_VD, dtype)
    bias_V = None if head.bias_V is None else _stored(source, skeleton, head.bias_V, dtype)
    if weight_VD is None or (bias_V is None) != (head.bias_V is None):
        return None
    return replace(head, weight_VD=weight_VD, bias_V=bias_V)


def _stored(source: Source, skeleton: PreTrainedModel, wanted: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A parameter by any of the names that it and those tied to it have."""
    from safetensors import safe_open

    names = {name for name, one in skeleton.named_parameters(remove_duplicate=False) if one is wanted}
    for path in weight_files(source):
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, framework="pt") as file:
            for name in names & set(file.keys()):
                return file.get_tensor(name).to(dtype)
    return None
