"""A student in few bits: its weights trained on the grid of the file that ships, or frozen there under adapters.

Straight-through training keeps float weights, computes with the nearest point of the grid, and hands the gradient to
the float weights as if there were no rounding (Bengio et al. 2013). The grids are those of the weights it begins with
and stay: so a step costs little more than without, and the k-quants' long search for scales is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from limbeck.models.quantization import FORMATS, BlockFormat, Grid, dequantise, grid_of, packed, snap, weighted_grid
from limbeck.models.quantization.files import QuantizedWeights, Trained
from limbeck.models.quantization.importance import importance_of
from limbeck.models.quantization.layout import layout
from limbeck.types import LimbeckError, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec:
    """How a student's weights are quantised.

    Attributes:
        format: of the linear layers.
        weights: "straight_through" trains them on their grid; "frozen" leaves them there, for adapters.
        embeddings: format of the token embeddings and the head; None leaves them in float32.
        fallback: format of linear layers whose rows the blocks of `format` do not divide; None refuses those.
        grid: how the grid of each block is chosen: "nearest", as plain rounding does; "importance", with errors
            weighted by what the layer's inputs are on some responses.
    """

    format: str
    weights: Trained = "straight_through"
    embeddings: str | None = "q8_0"
    fallback: str | None = None
    grid: Literal["nearest", "importance"] = "nearest"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What was quantised of a student.

    Attributes:
        formats: names of formats by the weight's name in the plain model.
        on_grid: what keeps each weight on its grid, where they are trained.
        blocks: the bytes of each weight, where they stay as they are.
    """

    weights: Trained
    formats: Mapping[str, str]
    on_grid: Mapping[str, tuple[nn.Module, OnGrid]] = field(default_factory=dict)
    blocks: Mapping[str, Tensor] = field(default_factory=dict)

    def packed(self) -> QuantizedWeights:
        """The bytes of all weights as they are now."""
        blocks = dict(self.blocks)
        for name, (module, kept) in self.on_grid.items():
            weight: Any = module.parametrizations["weight"]  # type: ignore[index]
            blocks[name] = packed(kept.format, weight.original, kept.grid)
        return QuantizedWeights(trained=self.weights, formats=dict(self.formats), blocks=blocks)


@cache
def _count_updates() -> None:
    """Let each step of an optimizer count as a change of its parameters, which that of fused ones does not."""

    def changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])

    register_optimizer_step_post_hook(changed)


class OnGrid(nn.Module):
    """The parametrisation of a weight that puts it on its grid and passes the gradient through."""

    def __init__(self, format: BlockFormat, grid: Grid):
        super().__init__()
        _count_updates()
        self.format = format
        self._parts = len(grid)
        for i, part in enumerate(grid):
            # A function of the weights that the student begins with: no checkpoint needs it.
            self.register_buffer(f"grid_{i}", part, persistent=False)
        self._seen: tuple[int, int] | None = None
        self._snapped: Tensor | None = None

    @property
    def grid(self) -> Grid:
        return tuple(getattr(self, f"grid_{i}") for i in range(self._parts))

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self._current(weight))  # type: ignore[return-value]

    def _current(self, weight: Tensor) -> Tensor:
        """The weight on its grid, computed once for each update of it."""
        now = (weight._version, weight.data_ptr())
        if self._snapped is None or self._seen != now:
            # What was made in inference mode could not enter a graph later on.
            with torch.inference_mode(False), torch.no_grad():
                self._snapped, self._seen = snap(self.format, weight, self.grid).to(weight.dtype), now
        return self._snapped


class _StraightThrough(torch.autograd.Function):
    """The second operand as value, the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, snapped: Tensor) -> Tensor:
        del ctx, weight
        return snapped.view_as(snapped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], None


def check_quantizing(spec: QuantizeSpec, *, dtype: str, init: str, lora: bool) -> None:
    """Options of a student that contradict its quantisation.

    Raises:
        LimbeckError: they do.
    """
    if init == "scratch":
        raise LimbeckError(
            "student.quantize keeps the weights that a student begins with on their grid, but student.init=scratch "
            "begins with none; set student.init=teacher or pretrained, or remove student.quantize"
        )
    if spec.weights == "straight_through" and lora:
        raise LimbeckError(
            "student.quantize.weights=straight_through trains the weights and student.lora adapters on weights that "
            "stay; set student.quantize.weights=frozen, or remove student.lora"
        )
    if spec.weights == "frozen" and not lora:
        raise LimbeckError(
            "student.quantize.weights=frozen leaves nothing to train; add student.lora={r: 16}, or set "
            "student.quantize.weights=straight_through"
        )
    if dtype != "float32":
        raise LimbeckError(
            f"student.dtype is {dtype}, which does not hold every value of a grid; set student.dtype=float32 "
            "(train.bf16=true keeps the products fast)"
        )


def formats_of(model: PreTrainedModel, spec: QuantizeSpec) -> dict[str, str]:
    """Names of formats by the names of weights. No weights are read, so a model on "meta" will do.

    Raises:
        LimbeckError: as `layout`.
    """
    return layout(model, spec.format, embeddings=spec.embeddings, fallback=spec.fallback)


def quantized(model: PreTrainedModel, spec: QuantizeSpec, calibration: Sequence[TokenBatch] = ()) -> Quantization:
    """Put the weights of a model on their grids, in place, and keep them there.

    Args:
        calibration: responses that importance is measured on, where `spec.grid` asks for it.

    Raises:
        LimbeckError: as `layout`, or weights that a format's scales cannot reach.
    """
    formats = formats_of(model, spec)
    users = _users(model)
    importance: dict[str, Tensor] = {}
    if spec.grid == "importance":
        assert calibration, "the recipe's checks ask for responses"
        importance = importance_of(model, calibration, device=model.device)
    on_grid: dict[str, tuple[nn.Module, OnGrid]] = {}
    blocks: dict[str, Tensor] = {}
    for name, chosen in formats.items():
        modules = users[name]
        weight, format = modules[0].weight, FORMATS.build(chosen)
        assert isinstance(weight, nn.Parameter)
        if name in importance:
            # Rounded, so that sums in another order, of other threads, choose the same grid when a run is continued.
            grid = weighted_grid(format, weight, importance[name].to(torch.bfloat16).float())
        else:
            grid = grid_of(format, weight)
        if not all(part.isfinite().all() for part in (*grid, snap(format, weight, grid))):
            raise LimbeckError(
                f"{name} holds weights up to {weight.abs().max().item():.3g}, beyond the scales of {chosen} or not "
                "finite; choose another student.quantize.format"
            )
        if spec.weights == "frozen":
            blocks[name] = packed(format, weight, grid)
            with torch.no_grad():
                weight.copy_(dequantise(format, blocks[name]))
            continue
        kept = OnGrid(format, grid)
        for module in modules:
            parametrize.register_parametrization(module, "weight", kept)
        on_grid[name] = (modules[0], kept)
    return Quantization(weights=spec.weights, formats=formats, on_grid=on_grid, blocks=blocks)


def _users(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules that share each weight, by its first name."""
    first: dict[int, str] = {}
    users: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(first.setdefault(id(weight), f"{name}.weight"), []).append(module)
    return users
