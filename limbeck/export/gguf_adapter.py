"""Adapters on frozen blocks as a GGUF file of their own, for `llama-server --lora`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck.export.gguf_model import in_pairs, llama_cpp_name, rotated_heads
from limbeck.models.gguf_architectures import ARCHITECTURES
from limbeck.models.quantization import FORMATS, dequantise
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A merged weight is a rounded sum.
_ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters: a weight is ``W + alpha / r * B @ A``.

    Attributes:
        factors: A (r, in) and B (out, r) by the name of the weight that they are added to.
    """

    alpha: float
    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_adapters(folder: Path) -> Adapters:
    """The adapters that lie beside the blocks of a student.

    Raises:
        LimbeckError: there are none, or they are no plain LoRA.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        factors = load_file(folder / "adapter_model.safetensors")
        if config["peft_type"] != "LORA" or config.get("use_rslora") or config.get("use_dora"):
            raise ValueError("they are no plain LoRA")
        found = {}
        for name in factors:
            own, _, side = name.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
            if side == "lora_A":
                found[f"{own}.weight"] = factors[name], factors[name.replace("lora_A", "lora_B")]
        return Adapters(alpha=float(config["lora_alpha"]), factors=found)
    except (OSError, ValueError, KeyError) as error:
        raise LimbeckError(
            f"the adapters of {folder} cannot be read ({' '.join(str(error).split())[:120]}); make the student again "
            "with `limbeck run`"
        ) from error


@torch.no_grad()
def require_merged(model: PreTrainedModel, blocks: Mapping[str, tuple[str, Tensor]], adapters: Adapters) -> None:
    """See that a model's weights are those of the blocks with the adapters added.

    Raises:
        LimbeckError: one is not.
    """
    for name, (format, bytes_OY) in blocks.items():
        expected = dequantise(FORMATS.build(format), bytes_OY)
        if name in adapters.factors:
            a_RI, b_OR = adapters.factors[name]
            expected += adapters.alpha / len(a_RI) * (b_OR @ a_RI)
        weight: Tensor = model.get_parameter(name)
        if not (weight - expected).abs().max() <= _ROUNDING * expected.abs().max():
            raise LimbeckError(
                f"{name} is not what its block and its adapter make of it: it was changed after training; delete the "
                "folder quantized beside the weights to export these as they are"
            )


def write_gguf_adapter(path: Path, config: Any, adapters: Adapters, *, name: str) -> None:
    """Write one file for llama.cpp, as its own converter of adapters has it."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapters.alpha)
    rotated = rotated_heads(config)
    for own, (a_RI, b_OR) in adapters.factors.items():
        theirs = llama_cpp_name(config, own)
        heads = rotated.get(theirs.split(".")[-2])
        ordered = b_OR if heads is None else in_pairs(b_OR, heads)
        for side, factor in (("lora_a", a_RI), ("lora_b", ordered)):
            writer.add_tensor(f"{theirs}.{side}", factor.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
