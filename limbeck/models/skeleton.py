"""A model without its weights, for questions about its modules and sizes, without their memory."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from limbeck.models.fingerprints import weight_files
from limbeck.models.gguf import gguf_tensors
from limbeck.models.headers import safetensors_header
from limbeck.models.heads import decoder_of, head_of
from limbeck.models.loading import source_config, unbuildable, without_dropout
from limbeck.models.processors import auto_class
from limbeck.models.quiet import quiet_transformers
from limbeck.models.sources import Source, fetch_weights
from limbeck.types import Head, LimbeckError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def skeleton_of(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a model on torch's meta device, with its configuration and its settings of generation.

    Raises:
        LimbeckError: as `limbeck.models.loading.load_model`, of the configuration; or no model can be built from it.
    """
    from transformers import GenerationConfig

    config = without_dropout(source_config(source, trust_remote_code=trust_remote_code))
    kind = auto_class(config)
    with quiet_transformers(), torch.device("meta"):
        try:
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
            raise unbuildable(config, error) from error
        model.tie_weights()
        if source.gguf is None:
            # As from_pretrained: a model without the file has what its configuration says.
            with suppress(OSError):
                model.generation_config = GenerationConfig.from_pretrained(source.directory)
    _require_stored_shapes(source, model)
    return model


def _require_stored_shapes(source: Source, model: PreTrainedModel) -> None:
    """Refuse a configuration whose weight files, as far as they are at hand, hold tensors of other shapes."""
    if source.gguf is not None or "quantization_config" in model.config.to_dict():
        return  # of packed weights names are kept, not shapes
    shapes = {name: list(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
    for path in weight_files(source):
        if path.suffix != ".safetensors" or not path.is_file():
            continue
        for name, entry in safetensors_header(path).items():
            if shapes.get(name, entry["shape"]) != entry["shape"]:
                raise LimbeckError(
                    f"{source.name}: its config.json makes {name} {shapes[name]}, and {path.name} has "
                    f"{entry['shape']} (hidden_size, number of heads, ...); give both files of one model"
                )


def stored_head(source: Source, skeleton: PreTrainedModel, vocab_size: int, dtype: torch.dtype) -> Head | None:
    """The output head alone, read from the safetensors files as loading the model would have it.

    It is not verified on tokens, as in `head_of`: the code that took the hidden states has done that.

    Returns:
        None where the files have no tensor of its name.
    """
    head = head_of(skeleton, vocab_size, verify=False)
    if source.gguf is not None:
        return _head_of_gguf(source.gguf, head, dtype)
    weight_VD = _stored(source, skeleton, head.weight_VD, dtype)
    bias_V = None if head.bias_V is None else _stored(source, skeleton, head.bias_V, dtype)
    if weight_VD is None or (bias_V is None) != (head.bias_V is None):
        return None
    return replace(head, weight_VD=weight_VD, bias_V=bias_V)


def stored_ending(
    source: Source, skeleton: PreTrainedModel, vocab_size: int, dtype: torch.dtype
) -> tuple[nn.Module, Head]:
    """What a model does behind its last block: the final norm and the head, read from its files alone.

    Raises:
        LimbeckError: the files hold neither, or the model has no final norm beside its blocks.
    """
    norm = final_norm(skeleton)
    if source.kind == "hub":
        shape = head_of(skeleton, vocab_size, verify=False)
        wanted = (*norm.parameters(), shape.weight_VD, *([] if shape.bias_V is None else [shape.bias_V]))
        fetch_weights(source, _names_of(skeleton, *wanted))
    head = stored_head(source, skeleton, vocab_size, dtype)
    tensors = {name: _stored_norm(source, skeleton, name, wanted, dtype) for name, wanted in norm.named_parameters()}
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if head is None or missing:
        lacking = "head" if head is None else f"final norm ({missing[0]})"
        raise LimbeckError(
            f"{source.name} has no stored {lacking}, which hidden states from a server (teacher.support=full) need "
            "here; give its safetensors files or a GGUF file, of which no more than these is read, or "
            "take its likeliest tokens with teacher.support=topk_tail"
        )
    made = copy.deepcopy(norm)
    made.load_state_dict(tensors, assign=True)
    return made.eval().requires_grad_(False), head


def _stored_norm(
    source: Source, skeleton: PreTrainedModel, name: str, wanted: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """A parameter of the final norm by its name in that module."""
    if source.gguf is None:
        return _stored(source, skeleton, wanted, dtype)
    found = gguf_tensors(source.gguf, [f"output_norm.{name}"])
    return found[f"output_norm.{name}"].to(dtype) if found else None


def _head_of_gguf(path: Path, head: Head, dtype: torch.dtype) -> Head | None:
    """The head of a GGUF file, which leaves one out that is tied to the embeddings."""
    found = gguf_tensors(path, ["output.weight", "output.bias", "token_embd.weight"])
    weight_VD, bias_V = found.get("output.weight", found.get("token_embd.weight")), found.get("output.bias")
    if weight_VD is None or weight_VD.shape != head.weight_VD.shape or (bias_V is None) != (head.bias_V is None):
        return None
    return replace(head, weight_VD=weight_VD.to(dtype), bias_V=None if bias_V is None else bias_V.to(dtype))


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head.

    Raises:
        LimbeckError: there is none beside the blocks.
    """
    for module in decoder_of(model).modules():
        children = list(module.children())
        if any(isinstance(child, nn.ModuleList) for child in children):
            norms = [child for child in children if "norm" in type(child).__name__.lower()]
            if norms:
                return norms[-1]
    raise LimbeckError(
        f"{type(model).__name__} has no final norm beside its blocks, as far as it is understood; set "
        "teacher.support=topk_tail"
    )


def _names_of(skeleton: PreTrainedModel, *wanted: Tensor) -> set[str]:
    """The names that some parameters, and those tied to them, have."""
    named = skeleton.named_parameters(remove_duplicate=False)
    return {name for name, one in named if any(one is each for each in wanted)}


def _stored(source: Source, skeleton: PreTrainedModel, wanted: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A parameter by any of the names that it and those tied to it have."""
    from safetensors import safe_open

    names = _names_of(skeleton, wanted)
    for path in weight_files(source):
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, framework="pt") as file:
            for name in names & set(file.keys()):
                return file.get_tensor(name).to(dtype)
    return None
