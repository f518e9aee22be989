"""Width pruning: the smaller model with fewer hidden dimensions, fewer neurons and fewer heads in each block.

The same dimensions of the residual stream stay everywhere, since all blocks read and write it; each block keeps
neurons and heads of its own. Heads go in groups with the keys and values that they share; the size of a head stays.

What stays computes what it computed before. An RMSNorm divides by the mean square over all dimensions, which is another
number over those that stay: each norm's weight is multiplied by a factor that makes up for it on average, and exactly
where those that go carry nothing. Embeddings that a model multiplies by the root of its hidden size are treated alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.models.heads import causal_model, decoder_blocks
from limbeck.models.quiet import one_line
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What each dimension of a weight inside of a block runs over.
_AXES = {
    **{f"self_attn.{name}_proj.weight": (name, "hidden") for name in ("q", "k", "v")},
    **{f"self_attn.{name}_proj.bias": (name,) for name in ("q", "k", "v")},
    "self_attn.o_proj.weight": ("hidden", "q"),
    "self_attn.o_proj.bias": ("hidden",),
    **{f"mlp.{name}_proj.weight": ("mlp", "hidden") for name in ("gate", "up")},
    **{f"mlp.{name}_proj.bias": ("mlp",) for name in ("gate", "up")},
    "mlp.down_proj.weight": ("hidden", "mlp"),
    "mlp.down_proj.bias": ("hidden",),
}
# Norms of single queries and keys, which stay what they are.
_OF_HEADS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthSpec:
    """Sizes of a model that is pruned in width; None leaves one as it is. The names are those of configurations."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthChoice:
    """What stays of a model that is pruned in width, ascending numbers of the whole one; what is not cut is empty.

    Attributes:
        hidden: dimensions of the residual stream.
        neurons: of each block's feed-forward layer.
        groups: of each block's heads, a group being those with the same keys and values.
        norm_factors: by the name of each norm over the residual stream; empty where that is not cut.
        importance: share of the summed importance that stays, by the name of the size.
        tokens: that importance was measured on.
    """

    hidden: tuple[int, ...] = ()
    neurons: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    norm_factors: Mapping[str, float] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of a block: in groups that share keys and values."""

    count: int
    groups: int
    size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Heads:
        text: Any = config.get_text_config()
        count = int(text.num_attention_heads)
        size = getattr(text, "head_dim", None) or text.hidden_size // count
        return cls(count=count, groups=int(getattr(text, "num_key_value_heads", None) or count), size=int(size))

    @property
    def together(self) -> int:
        """Heads of a group."""
        return self.count // self.groups


def width_config(config: PretrainedConfig, sizes: WidthSpec) -> PretrainedConfig:
    """A copy of a configuration with other widths; the size of a head is that of the whole model.

    Raises:
        LimbeckError: a size that is no cut of the model, or that the architecture refuses.
    """
    whole: Any = config.get_text_config()
    heads, changes = Heads.of(config), {}
    for name in ("hidden_size", "intermediate_size"):
        size, there = getattr(sizes, name), getattr(whole, name, None)
        if size is None:
            continue
        if not isinstance(there, int) or not 1 <= size < there:
            raise LimbeckError(f"student.width.{name} is {size}; the model has {there}, so expected fewer")
        changes[name] = size
    if (count := sizes.num_attention_heads) is not None:
        if not 1 <= count < heads.count or count % heads.together:
            fitting = [n * heads.together for n in range(1, heads.groups)]
            expected = f"{_some(fitting)}" if fitting else "the model's own"
            raise LimbeckError(
                f"student.width.num_attention_heads is {count}; the model has {heads.count} heads in {heads.groups} "
                f"groups that share keys and values, which go whole, so expected {expected}"
            )
        changes |= {"num_attention_heads": count, "num_key_value_heads": count // heads.together}
    if not changes:
        raise LimbeckError("student.width names no size; set hidden_size, intermediate_size or num_attention_heads")
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    for name, value in {**changes, "head_dim": heads.size}.items():
        setattr(text, name, value)
    try:
        type(text).from_dict(text.to_dict())
    except Exception as error:
        # An architecture may ask that its sizes divide each other, by an exception of its own.
        named = {name: size for name, size in asdict(sizes).items() if size is not None}
        raise LimbeckError(f"student.width={named} is refused: {one_line(error)}; choose sizes that fit") from error
    return config


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) < 6 else f"a multiple of {numbers[0]} up to {numbers[-1]}"


def require_cuttable(model: nn.Module, sizes: WidthSpec) -> None:
    """Check that every weight is one whose dimensions are known; the model may be on torch's meta device.

    Raises:
        LimbeckError: naming the weight that is not.
    """
    list(axes_of(model))
    if sizes.hidden_size is not None:
        for name, norm in norms_of(model).items():
            norm_offset(name, norm)


def axes_of(model: nn.Module) -> Iterator[tuple[str, int | None, tuple[str | None, ...]]]:
    """Each weight with the number of its block, None outside of them, and what its dimensions run over.

    Raises:
        LimbeckError: a weight that is not known.
    """
    inner = causal_model(model)
    blocks = f"{decoder_blocks(inner)[0]}."
    width, head = inner.config.get_text_config().hidden_size, Heads.of(inner.config).size
    tables = _tables(inner)
    norms = {f"{name}.weight" for name in norms_of(inner)}
    for key, weight in inner.state_dict().items():
        number, rest = None, key
        if key.startswith(blocks):
            text, rest = key.removeprefix(blocks).split(".", 1)
            number = int(text)
        axes: tuple[str | None, ...] | None = _AXES.get(rest) if number is not None else tables.get(key)
        if key in norms:
            axes = ("hidden",)
        elif number is not None and rest in _OF_HEADS and weight.shape == (head,):
            axes = (None,)
        if axes is None or len(axes) != weight.ndim or ("hidden" in axes and width not in weight.shape):
            raise LimbeckError(
                f"{type(inner).__name__} cannot be width-pruned: of its weight {key} it is not known what its "
                "dimensions are; set student.init=depth_prune, or name another model"
            )
        yield key, number, axes


def _tables(inner: PreTrainedModel) -> dict[str, tuple[str | None, ...]]:
    """Input and output embeddings by name."""
    found: dict[str, tuple[str | None, ...]] = {}
    tables = (inner.get_input_embeddings(), inner.get_output_embeddings())
    for name, module in inner.named_modules(remove_duplicate=False):
        if any(module is table for table in tables):
            found |= {f"{name}.weight": (None, "hidden"), f"{name}.bias": (None,)}
    return found


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norms over the residual stream by name."""
    inner = causal_model(model)
    width = inner.config.get_text_config().hidden_size
    return {
        name: module
        for name, module in inner.named_modules()
        if type(module).__name__.endswith("Norm")
        and getattr(module, "weight", None) is not None
        and module.weight.shape == (width,)  # type: ignore[union-attr]
        and not f"{name}.weight".endswith(_OF_HEADS)
    }


def norm_offset(name: str, norm: nn.Module) -> float:
    """What an RMSNorm adds to its weight before it multiplies: 0, or 1 in Gemma.

    Raises:
        LimbeckError: a norm of another kind, such as one that takes the mean away.
    """
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    x_ND = torch.linspace(-1, 2, 2 * probe.weight.numel()).sin().view(2, -1) + 0.5
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.fill_(2.0)
        factor_ND = probe(x_ND) / (x_ND * x_ND.square().mean(-1, keepdim=True).rsqrt())
    for offset in (0.0, 1.0):
        if torch.allclose(factor_ND, torch.tensor(2 + offset), rtol=1e-3):
            return offset
    raise LimbeckError(
        f"student.width.hidden_size cannot be cut: {name} is a {type(norm).__name__}, and only the weights of an "
        "RMSNorm can make up for dimensions that are gone; leave it out"
    )


def spread(groups: Sequence[int], size: int) -> Tensor:
    """Numbers of the entries of some groups of so many each."""
    return (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten()


def sizes_of(choice: WidthChoice, config: PretrainedConfig) -> WidthSpec:
    """The sizes of a choice."""
    return WidthSpec(
        hidden_size=len(choice.hidden) or None,
        intermediate_size=len(choice.neurons[0]) if choice.neurons else None,
        num_attention_heads=len(choice.groups[0]) * Heads.of(config).together if choice.groups else None,
    )


def read_width(record: Any, path: Path) -> WidthChoice | None:
    """A choice as it was kept in a file.

    Raises:
        LimbeckError: a damaged one.
    """
    if record is None:
        return None
    try:
        rows = {name: tuple(tuple(map(int, row)) for row in record[name]) for name in ("neurons", "groups")}
        factors = {str(name): float(factor) for name, factor in record["norm_factors"].items()}
        hidden = tuple(map(int, record["hidden"]))
        return WidthChoice(**{**record, **rows, "hidden": hidden, "norm_factors": factors})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LimbeckError(
            f"{path} is damaged (width: {one_line(error):.60}); delete it and run the same command again"
        ) from error
