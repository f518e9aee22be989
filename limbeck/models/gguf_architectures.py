"""Architectures that limbeck writes as GGUF, the format of llama.cpp's files."""

from __future__ import annotations

from typing import Any

from limbeck.types import LimbeckError

# transformers' model types and llama.cpp's architectures.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# The kinds of rope that llama.cpp knows of each.
_ROPES = {"llama": ("default", "llama3"), "qwen2": ("default",), "qwen3": ("default",)}


def require_known(config: Any) -> None:
    """Check that a GGUF file can express all of the configuration.

    Raises:
        LimbeckError: it cannot.
    """
    fields = config.to_dict()
    if config.model_type not in ARCHITECTURES:
        raise LimbeckError(
            f"{config.model_type} models cannot be exported as GGUF, expected one of {', '.join(ARCHITECTURES)}; "
            "export safetensors"
        )
    rope = fields.get("rope_parameters") or {}
    head_size = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    usual = {"llama": head_size, "qwen2": config.hidden_size // config.num_attention_heads, "qwen3": 128}
    strange = {
        f"rope type {rope.get('rope_type')}": rope.get("rope_type", "default") not in _ROPES[config.model_type],
        "partial rotary embeddings": (rope.get("partial_rotary_factor") or 1) != 1,
        "sliding windows": any(kind != "full_attention" for kind in fields.get("layer_types") or ()),
        f"{fields.get('hidden_act')} activations": fields.get("hidden_act") != "silu",
        "biases": bool(fields.get("attention_bias")) or bool(fields.get("mlp_bias")),
        f"heads of {head_size} dimensions": head_size != usual[config.model_type],
    }
    for what, is_so in strange.items():
        if is_so:
            raise LimbeckError(
                f"this {config.model_type} model has {what}, which its export as GGUF does not know; "
                "export safetensors, or convert those with llama.cpp's own converter"
            )
