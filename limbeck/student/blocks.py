"""The blocks of a model: finding them, leaving some out for a while, and building the model without them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.models.heads import causal_model, decoder_blocks, decoder_of
from limbeck.models.loading import without_dropout
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.models.slices import is_unread, no_weights, take_places
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PROBE_TOKENS = 6
# Of the memory that torch takes for a tensor, in bytes.
_ALIGNMENT = 64
_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2}


@contextlib.contextmanager
def left_out(
    blocks: Sequence[nn.Module],
    removed: Sequence[int],
    *,
    as_tuple: bool,
    start: tuple[int, Tensor] | None = None,
) -> Iterator[None]:
    """Let some blocks hand on what they get. Their places stay, so that everything tied to a block's number holds.

    Args:
        as_tuple: the blocks put out (hidden, attention weights) instead of hidden states alone.
        start: a block and the hidden states (B, T, D) it puts out; those before it are skipped too.
    """
    first = -1 if start is None else start[0]
    skipped = {*removed, *range(first + 1)}
    before = {i: blocks[i].__dict__.get("forward") for i in skipped}
    for i in skipped:
        blocks[i].forward = _hand_on(start[1] if start is not None and i == first else None, as_tuple)
    try:
        yield
    finally:
        for i, forward in before.items():
            del blocks[i].forward
            if forward is not None:
                blocks[i].forward = forward


def _hand_on(put_out: Tensor | None, as_tuple: bool) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        # Masks, positions and caches are for blocks that compute.
        del args, kwargs
        out = hidden_states if put_out is None else put_out
        return (out, None) if as_tuple else out

    return forward


def last_block_output(blocks: Sequence[nn.Module], run: Callable[[], object]) -> Any:
    """Output of the last block while `run` is called: hidden states, or a tuple that starts with them."""
    outs: list[Any] = []
    hook = blocks[-1].register_forward_hook(lambda module, args, out: outs.append(out))
    try:
        run()
    finally:
        hook.remove()
    return outs[0]


def depth_prune(
    model: nn.Module, keep: Sequence[int], *, dtype: torch.dtype | None = None, take: bool = False
) -> PreTrainedModel:
    """A new model on the CPU with the blocks in `keep` and everything else. `model` is left untouched.

    The configuration follows (number of layers, fields that describe every block), so that the result can be saved and
    loaded like any other model, and generates with a cache. The result is checked against `model` with the other blocks
    left out; that of a model whose weights are still in its files has its own there, and `blocks_stay_alike` checks it.

    Args:
        keep: block numbers, ascending.
        dtype: of the new model; None keeps the old one's.
        take: have the tensors of `model` itself, where precision and place agree, and not copies of them: for a model
            that is not used any more once the new one is changed. Those that lie in memory as no copy would, such as
            in a mapped file, are copied: products of the same numbers may end in other bits there.

    Raises:
        LimbeckError: `keep` is not a list of ascending block numbers, or the architecture does not survive the cut.
    """
    inner = causal_model(model)
    name, blocks = decoder_blocks(inner)
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(blocks):
        raise LimbeckError(f"blocks to keep are {kept}; expected ascending numbers from 0 to {len(blocks) - 1}")
    config = without_dropout(pruned_config(inner.config, kept))
    if is_unread(inner):
        return _cut_unread(inner, config, kept)
    state = {}
    for key, value in inner.state_dict().items():
        if key.startswith(f"{name}."):
            number, rest = key.removeprefix(f"{name}.").split(".", 1)
            if int(number) not in kept:
                continue
            key = f"{name}.{kept.index(int(number))}.{rest}"
        state[key] = value.detach().to("cpu", copy=not take or value.data_ptr() % _ALIGNMENT != 0)
    pruned = assembled(inner, config, state, dtype or inner.dtype, "depth-pruned")
    if pruned.generation_config is not None and inner.generation_config is not None:
        pruned.generation_config = copy.deepcopy(inner.generation_config)
    _check_cut(inner, pruned, [i for i in range(len(blocks)) if i not in kept])
    return pruned.eval()


def _cut_unread(inner: PreTrainedModel, config: PretrainedConfig, kept: Sequence[int]) -> PreTrainedModel:
    """The pruned model, with weights that are still in the files of the whole one."""
    pruned = _on_meta(inner, config)
    pruned.tie_weights()
    pruned.generation_config = copy.deepcopy(inner.generation_config)
    blocks = decoder_blocks(inner)[0]

    def name_of(name: str) -> str:
        number, dot, rest = name.removeprefix(f"{blocks}.").partition(".")
        return f"{blocks}.{kept[int(number)]}{dot}{rest}" if name.startswith(f"{blocks}.") else name

    take_places(pruned, inner, name_of)
    return pruned.eval()


def _on_meta(like: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the class of another one, with another configuration and no weights."""
    attention = like.config._attn_implementation
    with quiet_transformers(), no_weights():
        return type(like)._from_config(config, dtype=like.dtype, attn_implementation=attention)


def blocks_stay_alike(model: nn.Module, keep: Sequence[int]) -> bool:
    """Whether the blocks of a pruned model, of which no weights are read, are built as they are in the whole one.

    What a class makes of a block's place, such as every sixth one with another kind of attention, shows in its
    attributes. A model with weights is computed with instead.
    """
    inner = causal_model(model)
    pruned = _on_meta(inner, without_dropout(pruned_config(inner.config, keep)))
    return all(
        _plain_attributes(decoder_blocks(inner)[1][old]) == _plain_attributes(block)
        for old, block in zip(keep, decoder_blocks(pruned)[1], strict=True)
    )


def _plain_attributes(block: nn.Module) -> dict[str, Any]:
    """Numbers and words of a block and its modules, its own number aside."""
    return {
        f"{name}.{key}": value
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if key not in ("layer_idx", "training") and isinstance(value, bool | int | float | str | None)
    }


def assembled(
    inner: PreTrainedModel, config: PretrainedConfig, state: dict[str, Tensor], dtype: torch.dtype, how: str
) -> PreTrainedModel:
    """A model of the class of `inner` with another configuration and weights.

    Args:
        how: what was done to it, in messages.

    Raises:
        LimbeckError: the weights are not those of the configuration.
    """
    try:
        with quiet_transformers():
            loaded: Any = type(inner).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                attn_implementation=inner.config._attn_implementation,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise LimbeckError(f"{type(inner).__name__} cannot be {how}: {one_line(error)}") from error
    pruned, info = loaded
    if strange := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise LimbeckError(
            f"{type(inner).__name__} cannot be {how}: its blocks differ from what its configuration says "
            f"after the cut ({strange[0]})"
        )
    # Made of tensors as they are in memory, it is saved as the files are that `inner` comes from: experts one by one,
    # under the names that other programs know.
    if (conversions := vars(inner).get("_weight_conversions")) is None:
        vars(pruned).pop("_weight_conversions", None)
    else:
        pruned._weight_conversions = conversions
    return pruned


def per_layer_fields(config: PretrainedConfig) -> tuple[str, ...]:
    """Names of the configuration fields that hold one entry for every block (layer_types and the like)."""
    depth = config.num_hidden_layers
    return tuple(
        key for key, value in config.to_dict().items() if isinstance(value, list | tuple) and len(value) == depth
    )


def pruned_config(config: PretrainedConfig, keep: Sequence[int]) -> PretrainedConfig:
    """A copy of the configuration for the blocks in `keep`."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    entries = {key: getattr(text, key) for key in per_layer_fields(text)}
    text.num_hidden_layers = len(keep)
    for key, value in entries.items():
        setattr(text, key, type(value)(value[i] for i in keep))
    return config


@torch.no_grad()
def _check_cut(inner: PreTrainedModel, pruned: PreTrainedModel, removed: list[int]) -> None:
    """The pruned model must equal the whole one with the same blocks left out."""
    blocks = list(decoder_blocks(inner)[1])
    ids_BT = torch.arange(_PROBE_TOKENS)[None] % inner.config.get_text_config().vocab_size
    there_BT = ids_BT.to(inner.device)
    was_training = inner.training
    inner.eval()

    def run() -> Tensor:
        return decoder_of(inner)(input_ids=there_BT, use_cache=False).last_hidden_state

    try:
        as_tuple = isinstance(last_block_output(blocks, run), tuple)
        with left_out(blocks, removed, as_tuple=as_tuple):
            expected_BTD = run().float().cpu()
    finally:
        inner.train(was_training)
    got_BTD = decoder_of(pruned.eval())(input_ids=ids_BT, use_cache=False).last_hidden_state.float()
    loose = max(_TOLERANCE.get(dtype, 1e-4) for dtype in (inner.dtype, pruned.dtype))
    gap, size = (got_BTD - expected_BTD).abs().max().item(), expected_BTD.abs().max().item()
    if not gap <= loose * size:
        raise LimbeckError(
            f"{type(inner).__name__} cannot be depth-pruned: without the same blocks it computes something else "
            f"(hidden states differ by {gap:.2g} of {size:.2g}); name another architecture or student.init"
        )
