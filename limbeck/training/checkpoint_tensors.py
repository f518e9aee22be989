"""Weights and moments of a training by name: as they are kept, and as they go into the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

# Whole, on rank 0; of what is trained.
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
SCATTERED = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
# As each rank keeps it.
_KEPT = StateDictOptions(ignore_frozen_params=True, strict=False)


def weight_parts(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights by name, as this rank keeps them: the tensors themselves."""
    return once(get_model_state_dict(model, options=_KEPT), model)


def put_weights_back(kept: Mapping[str, Tensor], model: nn.Module) -> None:
    """Put what `weight_parts` gave back, with other values in it."""
    set_model_state_dict(model, dict(kept), options=_KEPT)


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained weights and their moments by name, as this rank keeps them: the tensors themselves."""
    return weight_parts(model) | flat(get_optimizer_state_dict(model, optimizer, options=_KEPT)["state"])


def put_back(kept: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put what `parts` gave back, with other values in it."""
    names = {name for name, _ in model.named_parameters()}
    moments: dict[str, Any] = {"state": nested({name: part for name, part in kept.items() if name not in names})}
    moments["param_groups"] = named_groups(model, optimizer)
    put_weights_back({name: part for name, part in kept.items() if name in names}, model)
    set_optimizer_state_dict(model, optimizer, moments, options=_KEPT)


def once(weights: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Tied weights under their first name alone; the model itself restores the tie."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    aliases = names - {name for name, _ in model.named_parameters()}
    return {name: tensor.contiguous() for name, tensor in weights.items() if name not in aliases}


def flat(state: Any) -> dict[str, Tensor]:
    """Moments by the names of their weights and their own; a plain number is a tensor of int64 without dimensions."""
    return {f"{name}.{key}": value for name, entry in state.items() for key, value in _tensors(entry)}


def _tensors(entry: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            # bitsandbytes keeps what FSDP must not gather one level below; tables in it are the same for all weights.
            yield from ((f"{key}/{inner}", tensor.clone()) for inner, tensor in _tensors(value))
        else:
            yield key, value.contiguous() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What `flat` gave, as an optimizer takes it."""
    state: dict[str, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition(".")
        counts = tensor.ndim == 0 and tensor.dtype == torch.int64
        entry = state.setdefault(name, {})
        *above, key = key.split("/")
        for level in above:
            entry = entry.setdefault(level, {})
        entry[key] = tensor.item() if counts else tensor
    return state


def named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's own groups and settings (the recipe's), parameters by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
