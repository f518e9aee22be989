"""The choice of what stays of a model that is pruned in width, by the size of activations (Minitron, arXiv 2407.14679).

One forward pass over a few responses with their prompts. Importance is the mean magnitude over the tokens of a row, and
over rows the root of the sum of squares (the paper's mean over the sequence and L2 over the batch): of a dimension of
the residual stream what all norms put out, summed; of a neuron what the feed-forward layer projects down; of a group of
heads the length of what each head gives to the output projection, summed over the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.models.heads import decoder_blocks, decoder_of
from limbeck.ops import onednn
from limbeck.student.pruning import calibration_rows
from limbeck.student.width import (
    Heads,
    WidthChoice,
    WidthSpec,
    norms_of,
    require_cuttable,
    width_config,
)
from limbeck.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, WINDOW, TOGETHER = 24, 128, 8


@torch.no_grad()
def choose_width(
    model: PreTrainedModel,
    batches: Sequence[TokenBatch],
    sizes: WidthSpec,
    *,
    rows: int = ROWS,
    window: int = WINDOW,
) -> WidthChoice:
    """Choose what stays of each width. The same input gives the same choice.

    Args:
        batches: responses with their prompts; `calibration_rows` says which parts are used.
        rows: how many responses are used.
        window: how many tokens of each.

    Raises:
        LimbeckError: sizes that are no cut of the model, an architecture whose weights are not known, or no calibration
            tokens.
    """
    width_config(model.config, sizes)
    require_cuttable(model, sizes)
    found = _Activations(model, sizes)
    ids_BT, real_BT, _ = calibration_rows(batches, rows, window)
    was_training = model.training
    model.eval()
    try:
        for ids, real in zip(ids_BT.split(TOGETHER), real_BT.split(TOGETHER), strict=True):
            found.read(ids, real)
    finally:
        model.train(was_training)
        found.close()
    return found.choice(sizes, int(real_BT.sum()))


class _Activations:
    """Sums of activations of a model, by hooks."""

    def __init__(self, model: PreTrainedModel, sizes: WidthSpec) -> None:
        self.model, self.heads = model, Heads.of(model.config)
        self.squares: dict[str, Tensor] = {}
        # Of each norm: the mean share of a token's squared length in each dimension of its input.
        self.energy: dict[str, Tensor] = {}
        self.tokens, self.hooks = 0, []
        self.norms = norms_of(model) if sizes.hidden_size is not None else {}
        for name, norm in self.norms.items():
            self.hooks.append(norm.register_forward_hook(self._norm(name)))
        blocks = list(decoder_blocks(model)[1])
        self.depth = len(blocks)
        for number, block in enumerate(blocks):
            part: Any = block
            if sizes.intermediate_size is not None:
                self.hooks.append(part.mlp.down_proj.register_forward_pre_hook(self._neurons(number)))
            if sizes.num_attention_heads is not None:
                self.hooks.append(part.self_attn.o_proj.register_forward_pre_hook(self._heads(number)))

    def read(self, ids_BT: Tensor, real_BT: Tensor) -> None:
        """Read some rows; padding is on the right, attention causal."""
        device = self.model.device
        self.real_BT = real_BT.to(device).bool()
        self.tokens += int(self.real_BT.sum())
        with onednn.linears():
            decoder_of(self.model)(input_ids=ids_BT.to(device), use_cache=False)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _norm(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            del module
            self._add(name, out.float().abs())
            real_ND = args[0][self.real_BT].float().square()
            share_D = (real_ND / real_ND.sum(-1, keepdim=True).clamp_min(1e-30)).double().sum(0)
            self.energy[name] = self.energy.get(name, 0) + share_D

        return note

    def _neurons(self, number: int) -> Callable[..., None]:
        return lambda module, args: self._add(f"mlp.{number}", args[0].float().abs())

    def _heads(self, number: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            per_head_BTH = args[0].float().unflatten(-1, (self.heads.count, self.heads.size)).norm(dim=-1)
            self._add(f"heads.{number}", per_head_BTH.unflatten(-1, (self.heads.groups, -1)).sum(-1))

        return note

    def _add(self, name: str, size_BTX: Tensor) -> None:
        real_BT1 = self.real_BT[..., None]
        mean_BX = (size_BTX * real_BT1).sum(1) / real_BT1.sum(1)
        self.squares[name] = self.squares.get(name, 0) + mean_BX.double().square().sum(0)

    def choice(self, sizes: WidthSpec, tokens: int) -> WidthChoice:
        hidden: tuple[int, ...] = ()
        neurons, groups, shares, factors = [], [], {}, {}
        if sizes.hidden_size is not None:
            summed_D = sum((self.squares[name].sqrt() for name in self.norms), torch.zeros(()).double())
            (hidden,), shares["hidden_size"] = _largest([summed_D], sizes.hidden_size)
            factors = {name: self._factor(name, hidden) for name in self.norms}
        if sizes.intermediate_size is not None:
            found = [self.squares[f"mlp.{i}"].sqrt() for i in range(self.depth)]
            neurons, shares["intermediate_size"] = _largest(found, sizes.intermediate_size)
        if sizes.num_attention_heads is not None:
            found = [self.squares[f"heads.{i}"].sqrt() for i in range(self.depth)]
            groups, shares["num_attention_heads"] = _largest(found, sizes.num_attention_heads // self.heads.together)
        return WidthChoice(
            hidden=hidden,
            neurons=tuple(neurons),
            groups=tuple(groups),
            norm_factors=factors,
            importance=shares,
            tokens=tokens,
        )

    def _factor(self, name: str, hidden: Sequence[int]) -> float:
        """What a norm is multiplied by, so that it divides by the mean square over all dimensions on average."""
        share_D = self.energy[name] / self.tokens
        return float((share_D[list(hidden)].sum() * len(share_D) / len(hidden)).sqrt())


def _largest(importances: Sequence[Tensor], count: int) -> tuple[list[tuple[int, ...]], float]:
    """Numbers of the most important entries of each list, ascending, and their share of all importance.

    Equally important ones go by number.
    """
    kept, part, whole = [], 0.0, 0.0
    for importance_X in importances:
        order = torch.sort(importance_X, descending=True, stable=True).indices[:count]
        kept.append(tuple(sorted(order.tolist())))
        part += float(importance_X[order].sum())
        whole += float(importance_X.sum())
    return kept, part / whole if whole else 1.0
