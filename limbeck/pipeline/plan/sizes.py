"""Sizes of the models of a run, from their configurations alone: nothing of their weights is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from limbeck.models.heads import decoder_blocks
from limbeck.student.adapters import LoraSpec
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory and time of a model depend on.

    Attributes:
        parameters: tied ones counted once.
        embeddings: of them, those of the input embeddings and of a head of its own.
        head: those of the head, tied or not.
        block: of the largest block.
        linears: of the linear layers inside of the blocks.
        mlp: width inside of a block's feed-forward layer.
        query, key: widths of all queries, and of all keys, of a position.
    """

    parameters: int
    embeddings: int
    head: int
    block: int
    blocks: int
    linears: int
    width: int
    mlp: int
    query: int
    key: int
    vocabulary: int

    @property
    def outside(self) -> int:
        """Parameters outside of the blocks: embeddings, last norm, head."""
        return max(self.parameters - self.blocks * self.block, self.embeddings)

    def kv_bytes(self, number_bytes: int) -> int:
        """Bytes of keys and values of one token of context."""
        return 2 * self.blocks * self.key * number_bytes


@dataclass(frozen=True, kw_only=True)
class StudentSize:
    """A student as it is trained.

    Attributes:
        model: as it is saved.
        trained: parameters that get gradients.
        adapters: parameters of adapters, which are merged when it is saved.
        number_bytes: of a weight.
    """

    model: ModelSize
    trained: int
    adapters: int
    number_bytes: int

    @property
    def held(self) -> int:
        """Parameters in memory while it trains."""
        return self.model.parameters + self.adapters

    @property
    def head_trained(self) -> bool:
        """Whether the head gets a gradient."""
        return not self.adapters and self.trained >= self.model.parameters


def size_of(model: PreTrainedModel) -> ModelSize:
    """The size of a model, which may be on torch's meta device."""
    text: Any = model.config.get_text_config()
    blocks = _blocks_of(model)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    width = int(text.hidden_size)
    head_size = int(getattr(text, "head_dim", None) or width // heads)
    output: Any = model.get_output_embeddings()
    tables = {id(weight): weight for weight in _tables(model)}
    linears: list[Any] = [module for block in blocks for module in block.modules() if _is_linear(module)]
    return ModelSize(
        parameters=_count(model.parameters()),
        embeddings=_count(tables.values()),
        head=0 if output is None else output.weight.numel(),
        block=max(_count(block.parameters()) for block in blocks),
        blocks=len(blocks),
        linears=_count(module.weight for module in linears),
        width=width,
        mlp=_mlp_of(text, width),
        query=heads * head_size,
        key=int(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        vocabulary=0 if output is None else output.weight.shape[0],
    )


def adapters_of(model: PreTrainedModel, lora: LoraSpec) -> int:
    """Parameters of adapters: two matrices for each layer that has one."""
    output = model.get_output_embeddings()
    found = 0
    for name, module in model.named_modules():
        named = any(name == target or name.endswith(f".{target}") for target in lora.target_modules)
        if _is_linear(module) and module is not output and (named or not lora.target_modules):
            weight: Any = module.weight
            found += lora.r * sum(weight.shape)
    return found


def _blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a model; the whole decoder, where it is not understood."""
    try:
        return list(decoder_blocks(model)[1])
    except LimbeckError:
        return [model.base_model]


def _tables(model: PreTrainedModel) -> list[Any]:
    """The weights of input and output embeddings."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module.weight for module in modules if module is not None]


def _mlp_of(text: Any, width: int) -> int:
    names = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
    return next((int(value) for name in names if (value := getattr(text, name, None))), 4 * width)


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())
