"""The cut of a model in width: the new model, checked against the whole one without what goes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.models.heads import causal_model, decoder_blocks, decoder_of, tolerance
from limbeck.models.loading import without_dropout
from limbeck.student.blocks import assembled
from limbeck.student.width import (
    Heads,
    WidthChoice,
    axes_of,
    norm_offset,
    norms_of,
    sizes_of,
    spread,
    width_config,
)
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 6
# A norm's epsilon counts by the share of dimensions that stay; beside embeddings that are small it shows.
_LOOSE = 2e-2


def width_prune(model: nn.Module, choice: WidthChoice, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A new model on the CPU with what a choice keeps of `model`, which is left untouched.

    The configuration follows, so that the result can be saved and loaded like any other model. The result is checked
    against `model` with what goes set to zero.

    Args:
        dtype: of the new model; None keeps the old one's.

    Raises:
        LimbeckError: sizes that are no cut of the model, or an architecture whose weights are not known.
    """
    inner = causal_model(model)
    config = without_dropout(width_config(inner.config, sizes_of(choice, inner.config)))
    pruned = assembled(inner, config, _cut_state(inner, choice), dtype or inner.dtype, "width-pruned")
    if pruned.generation_config is not None and inner.generation_config is not None:
        pruned.generation_config = copy.deepcopy(inner.generation_config)
    pruned.eval()
    if not choice.hidden:
        _check_cut(inner, pruned, choice)
        return pruned
    # The factor of a norm where what goes is zero, as the check has it; measured, it is another one for each.
    at_zero = math.sqrt(inner.config.get_text_config().hidden_size / len(choice.hidden))
    over_head = _match_embeddings(inner, pruned)
    _scale_norms(pruned, dict.fromkeys(choice.norm_factors, at_zero), over_head=over_head)
    _check_cut(inner, pruned, choice)
    _scale_norms(pruned, {name: f / at_zero for name, f in choice.norm_factors.items()}, over_head=1.0)
    return pruned


def _cut_state(inner: PreTrainedModel, choice: WidthChoice) -> dict[str, Tensor]:
    """Copies on the CPU of the weights that stay."""
    heads = Heads.of(inner.config)
    hidden = torch.tensor(choice.hidden) if choice.hidden else None
    weights, state = inner.state_dict(), {}
    for key, number, axes in axes_of(inner):
        kept = weights[key].detach().to("cpu", copy=True)
        for dim, axis in enumerate(axes):
            index = hidden if axis == "hidden" else None
            if axis == "mlp" and choice.neurons and number is not None:
                index = torch.tensor(choice.neurons[number])
            elif axis in ("q", "k", "v") and choice.groups and number is not None:
                index = spread(choice.groups[number], heads.size * (heads.together if axis == "q" else 1))
            kept = kept if index is None else kept.index_select(dim, index)
        state[key] = kept.contiguous()
    return state


@torch.no_grad()
def _match_embeddings(inner: PreTrainedModel, pruned: PreTrainedModel) -> float:
    """Let the blocks read what they read before where embeddings are multiplied by the root of the hidden size.

    Returns:
        What the embeddings were multiplied by, if the head has the same weights; else 1.
    """
    factor = _embedding_scale(inner) / _embedding_scale(pruned)
    if abs(factor - 1) < 1e-3:
        return 1.0
    table: Any = pruned.get_input_embeddings()
    head: Any = pruned.get_output_embeddings()
    table.weight.mul_(factor)
    return factor if head is not None and head.weight is table.weight else 1.0


def _embedding_scale(model: PreTrainedModel) -> float:
    """What the embeddings are multiplied by before the first block."""
    table: Any = model.get_input_embeddings()
    ids_BT = _probe(model)
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = decoder_blocks(model)[1][0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        _last_states(model, ids_BT)
    finally:
        hook.remove()
    embedded_BTD = table.weight[ids_BT].double()
    return float((seen[0].double() * embedded_BTD).sum() / embedded_BTD.square().sum())


@torch.no_grad()
def _scale_norms(pruned: PreTrainedModel, factors: Mapping[str, float], *, over_head: float) -> None:
    """Multiply what norms put out by factors; the last one also by 1 / `over_head`."""
    norms = norms_of(pruned)
    last = list(norms)[-1]
    for name, factor in factors.items():
        norm: Any = norms[name]
        offset = norm_offset(name, norm)
        wanted = (norm.weight.double() + offset) * (factor / over_head if name == last else factor)
        norm.weight.copy_(wanted - offset)


def _probe(model: PreTrainedModel) -> Tensor:
    ids_BT = torch.arange(_PROBE_TOKENS)[None] % model.config.get_text_config().vocab_size
    return ids_BT.to(model.device)


def _last_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        return decoder_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)


@torch.no_grad()
def _check_cut(inner: PreTrainedModel, pruned: PreTrainedModel, choice: WidthChoice) -> None:
    """The pruned model must put out the logits of the whole one with what goes set to zero."""
    with _without(inner, choice):
        expected_BTV = inner(input_ids=_probe(inner), use_cache=False).logits.float().cpu()
    got_BTV = pruned(input_ids=_probe(pruned), use_cache=False).logits.float().cpu()
    # Norms compute in float32, whatever the weights are kept in.
    loose = max(tolerance(dtype) for dtype in (torch.float32, inner.dtype, pruned.dtype))
    loose = max(loose, _LOOSE) if choice.hidden else loose
    gap, size = (got_BTV - expected_BTV).abs().max().item(), expected_BTV.abs().max().item()
    if not gap <= loose * size:
        raise LimbeckError(
            f"{type(inner).__name__} cannot be width-pruned: without the same parts it computes something else (logits "
            f"differ by {gap:.2g} of {size:.2g}); name another architecture or student.init"
        )


@contextlib.contextmanager
def _without(inner: PreTrainedModel, choice: WidthChoice) -> Iterator[None]:
    """Let a model compute with zeros in the place of what goes."""
    heads, hooks = Heads.of(inner.config), []
    was_training = inner.training
    try:
        for number, block in enumerate(decoder_blocks(inner)[1]):
            part: Any = block
            if choice.neurons:
                hooks.append(part.mlp.down_proj.register_forward_pre_hook(_zeroed_input(choice.neurons[number])))
            if choice.groups:
                entries = spread(choice.groups[number], heads.size * heads.together).tolist()
                hooks.append(part.self_attn.o_proj.register_forward_pre_hook(_zeroed_input(entries)))
            if choice.hidden:
                projections = (part.mlp.down_proj, part.self_attn.o_proj)
                hooks += [module.register_forward_hook(_zeroed_output(choice.hidden)) for module in projections]
        if choice.hidden:
            outs = (inner.get_input_embeddings(), *norms_of(inner).values())
            hooks += [module.register_forward_hook(_zeroed_output(choice.hidden)) for module in outs]
        inner.eval()
        yield
    finally:
        inner.train(was_training)
        for hook in hooks:
            hook.remove()


def _zeroed_input(kept: Sequence[int]) -> Callable[..., Any]:
    return lambda module, args: (_zeroed(args[0], kept), *args[1:])


def _zeroed_output(kept: Sequence[int]) -> Callable[..., Any]:
    return lambda module, args, out: _zeroed(out, kept)


def _zeroed(values: Tensor, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(values.shape[-1], dtype=values.dtype, device=values.device)
    mask[list(kept)] = 1
    return values * mask
