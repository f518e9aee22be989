"""Formats by weight of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from limbeck.models.quantization.formats import FORMATS, divides
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layout(model: PreTrainedModel, format: str, *, embeddings: str | None, fallback: str | None) -> dict[str, str]:
    """Names of formats by the names of weights; vectors, and what has none, stay as they are.

    Args:
        format: of the linear layers.
        embeddings: of the token embeddings and the head; None leaves these as they are.
        fallback: of linear layers whose rows the blocks of `format` do not divide; None refuses those.

    Raises:
        LimbeckError: an unknown format, a weight that it cannot hold, or an architecture with weights elsewhere.
    """
    for name in filter(None, (format, embeddings, fallback)):
        FORMATS.require(name)
    matrices = _matrices(model)
    found = {}
    for name, (kind, weight) in matrices.items():
        wanted = embeddings if kind == "embedding" else format
        if wanted is None:
            continue
        if not divides(FORMATS.build(wanted), weight) and kind == "linear" and fallback is not None:
            wanted = fallback
        if not divides(FORMATS.build(wanted), weight):
            raise LimbeckError(_misfit(name, wanted, weight, kind))
        found[name] = wanted
    return found


def _misfit(name: str, format: str, weight: Tensor, kind: str) -> str:
    other = FORMATS[format].replacement
    dividing = [known for known, member in FORMATS.items() if weight.shape[1] % member.width == 0]
    said = (
        f"{name} has rows of {weight.shape[1]} weights, which are no multiple of the {FORMATS[format].width} of a "
        f"block of {format}"
    )
    if kind == "embedding":
        options = "=null" if not dividing else f" to one of {', '.join(dividing)}, or to null"
        return f"{said}; set student.quantize.embeddings{options}"
    if not dividing:
        return f"{said}, nor of any other format's; quantise another model"
    best = other if other in dividing else dividing[0]
    return f"{said}; set student.quantize.fallback={best} for such rows, or another student.quantize.format"


def _matrices(model: PreTrainedModel) -> dict[str, tuple[str, Tensor]]:
    """Weights of linear layers, and token embeddings with the head, by name; tied ones under their first name.

    Raises:
        LimbeckError: a matrix anywhere else.
    """
    around = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    found: dict[str, tuple[str, Tensor]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or id(weight) in seen:
                continue
            seen.add(id(weight))
            ends = any(module is one for one in around)
            if own != "weight" or not (ends or isinstance(module, nn.Linear)):
                raise LimbeckError(
                    f"{type(model).__name__} has the matrix {name}.{own} in a {type(module).__name__}, and only linear "
                    "layers and token embeddings can be quantised; leave student.quantize out, or take another model"
                )
            found[f"{name}.weight"] = ("embedding" if ends else "linear", weight)
    return found


def replaced(formats: Mapping[str, str], format: str, embeddings: str | None) -> dict[str, list[str]]:
    """Weights that get another format than the requested one, by that format, for messages."""
    found: dict[str, list[str]] = {}
    for name, chosen in formats.items():
        if chosen not in (format, embeddings):
            found.setdefault(chosen, []).append(name)
    return found
