"""The importance matrix of a model: how much an error in each column of its weights counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.models.forward import hidden_states
from limbeck.types import TokenBatch


def importance_of(model: nn.Module, batches: Iterable[TokenBatch], *, device: torch.device) -> dict[str, Tensor]:
    """The mean square of each linear layer's inputs over some responses and their prompts, by the name of its weight.

    An error of a weight changes the layer's output by itself times the input, so by this the squared errors of a row
    are weighted (llama.cpp's importance matrix).

    Returns:
        (I,) float32 for each weight (O, I).
    """
    sums: dict[str, tuple[Tensor, int]] = {}
    for batch in batches:
        moved = batch.to(device)
        with _summing(model, moved.attention_mask_BT.bool(), sums), torch.no_grad():
            hidden_states(model, moved)
    return {name: (total / count).float() for name, (total, count) in sums.items()}


@contextmanager
def _summing(model: nn.Module, mask_BT: Tensor, sums: dict[str, tuple[Tensor, int]]) -> Iterator[None]:
    """While active, add the squares of the inputs of every linear layer at the tokens of a mask, and their number."""

    def watch(name: str) -> Any:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            found = inputs[0].detach()
            # Padding is no text. Layers behind a selection of positions see other shapes, and no padding.
            input_NI = (found[mask_BT] if found.shape[:-1] == mask_BT.shape else found.flatten(0, -2)).double()
            total, count = sums.get(name, (input_NI.new_zeros(input_NI.shape[1]), 0))
            sums[name] = total + input_NI.square().sum(0), count + len(input_NI)

        return seen

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(f"{name}.weight")) for name, module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
