"""A student in few bits: its weights trained on the grid of the file that ships, or frozen there under adapters.

Straight-through training (`limbeck.models.quantization.on_grid`) keeps the grids of the weights that the student begins
with, so that the k-quants' long search for scales is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from limbeck.models.heads import causal_model
from limbeck.models.quantization import FORMATS, dequantise, grid_of, packed, snap, weighted_grid
from limbeck.models.quantization.files import QuantizedWeights, Trained, read_blocks
from limbeck.models.quantization.importance import importance_of
from limbeck.models.quantization.layout import layout
from limbeck.models.quantization.on_grid import floats_of, put_on_grid, read_grids
from limbeck.models.slices import take_over
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
        blocks: the bytes of each weight, where they stay as they are.
    """

    weights: Trained
    formats: Mapping[str, str]
    blocks: Mapping[str, Tensor] = field(default_factory=dict)

    def packed(self, model: nn.Module) -> QuantizedWeights:
        """The bytes of all weights of the student, or of a copy with its whole weights, as they are now."""
        blocks, inner = dict(self.blocks), causal_model(model)
        for name in (one for one in self.formats if one not in blocks):
            floats, kept = floats_of(inner, name)
            blocks[name] = packed(kept.format, floats, kept.grid)
        return QuantizedWeights(trained=self.weights, formats=dict(self.formats), blocks=blocks)


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
        put_on_grid(modules, format, grid)
    return Quantization(weights=spec.weights, formats=formats, blocks=blocks)


def quantization_in(folder: Path, model: nn.Module) -> Quantization:
    """What `save_student` wrote of a student for slices, whose weights, which may be unread, are put on their grids."""
    if (found := read_blocks(folder)) is not None:
        return Quantization(weights="frozen", formats=found.formats, blocks=found.blocks)
    grids, users = read_grids(folder), _users(model)
    for name, (chosen, grid) in grids.items():
        put_on_grid(users[name], FORMATS.build(chosen), grid)
        for module in users[name]:
            take_over(module, "weight")
    return Quantization(weights="straight_through", formats={name: chosen for name, (chosen, _) in grids.items()})


def _users(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules that share each weight, by its first name."""
    first: dict[int, str] = {}
    users: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(first.setdefault(id(weight), f"{name}.weight"), []).append(module)
    return users
