"""The two halves of a language model: the decoder that ends in hidden states, and the head that makes logits of them.

The fused objectives never let the model project: they run the decoder and apply the head tile by tile. So the head
must be known exactly. It is read from the model's modules and configuration, and then checked on a few tokens; a model
whose logits are not reproduced is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.types import Head, LimbeckError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PROBE_TOKENS = 8
# Largest difference that rounding explains, relative to the largest logit. bfloat16 keeps 8 bits.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference that rounding explains, relative to the largest value."""
    return _TOLERANCE.get(dtype, 1e-4)


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, freed from a PEFT wrapper (whose adapters stay inside its layers)."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    from peft import PeftModel

    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise LimbeckError("prompt-tuning adapters live outside the layers and cannot be distilled; use LoRA")
        inner = model.get_base_model()
        assert isinstance(inner, PreTrainedModel)
        return inner
    raise LimbeckError(f"got a {type(model).__name__}, expected a transformers or PEFT causal language model")


def decoder_of(model: nn.Module) -> nn.Module:
    """The part whose `last_hidden_state` (B, T, D) is what the head projects. Gradients reach the adapters in it.

    Raises:
        LimbeckError: not a transformers or PEFT model, or one without a separate decoder.
    """
    inner = causal_model(model)
    if inner.base_model is inner:
        raise LimbeckError(f"{type(inner).__name__} has no decoder apart from its head; its objectives cannot be fused")
    return inner.base_model


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and its name inside the model; of an image-text model those of its language model.

    Raises:
        LimbeckError: the model has no list of as many modules as its configuration has layers.
    """
    inner = causal_model(model)
    depth = inner.config.get_text_config().num_hidden_layers
    # A vision tower may be as deep.
    of_text = set((inner.get_decoder() or inner).modules())
    found = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and module in of_text and len(module) == depth > 0
    ]
    if not found:
        raise LimbeckError(
            f"{type(inner).__name__} has no list of {depth} blocks; neither depth pruning nor sharding knows this "
            "architecture"
        )
    return min(found, key=lambda item: item[0].count("."))


def head_of(model: nn.Module, vocab_size: int, *, verify: bool = True) -> Head:
    """The output head over the first `vocab_size` rows of its weight: the model's own parameters, not copies.

    Args:
        vocab_size: number of real token ids; the weight may have more rows (padding) but not fewer.
        verify: run the model on a few tokens and compare its logits with the head's.

    Raises:
        LimbeckError: no linear head, too few rows, LoRA on the head, or logits that are not reproduced.
    """
    inner = causal_model(model)
    linear = _linear(inner)
    rows = linear.weight.shape[0]
    if vocab_size > rows:
        raise LimbeckError(
            f"{type(inner).__name__} has an output head of {rows} rows but its tokenizer has {vocab_size} ids; "
            "resize the embeddings or use the tokenizer that belongs to the model"
        )
    config = inner.config.get_text_config()
    head = Head(
        weight_VD=linear.weight,
        bias_V=linear.bias,
        scale=_scale(config),
        softcap=_softcap(config),
        vocab_size=vocab_size,
    )
    if verify:
        _verify(inner, head)
    return head


def project(head: Head, hidden_ND: Tensor) -> Tensor:
    """Logits (N, V) over the real ids, the naive way and in the weights' precision: the definition of a `Head`."""
    weight_VD = head.weight_VD[: head.vocab_size]
    bias_V = None if head.bias_V is None else head.bias_V[: head.vocab_size]
    logits_NV = F.linear(hidden_ND.to(weight_VD.dtype), weight_VD, bias_V) * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def _linear(model: PreTrainedModel) -> nn.Linear:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    module: Any = model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    if isinstance(module, BaseTunerLayer):
        raise LimbeckError(
            "the adapter covers the output head, whose weight must be one matrix; "
            "leave lm_head out of target_modules (modules_to_save=['lm_head'] trains it in full)"
        )
    if not isinstance(module, nn.Linear):
        got = "no output head" if module is None else f"a head of type {type(module).__name__}"
        raise LimbeckError(
            f"{type(model).__name__} has {got}, expected a linear one; this architecture is not supported"
        )
    return module


def _scale(config: PretrainedConfig) -> float:
    """Cohere and Falcon-H1 multiply; Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it."""
    fields = config.to_dict()
    scale = float(fields.get("logit_scale") or 1.0) * float(fields.get("lm_head_multiplier") or 1.0)
    factor = float(fields.get("logits_scaling") or 1.0)
    return scale * factor if config.model_type == "hyperclovax" else scale / factor


def _softcap(config: PretrainedConfig) -> float | None:
    """Gemma 2 and its descendants."""
    cap = config.to_dict().get("final_logit_softcapping")
    return None if not cap else float(cap)


@torch.no_grad()
def _verify(model: PreTrainedModel, head: Head) -> None:
    """Compare logits on two rows that differ in their last token only, which also shows whether attention is causal."""
    device = head.weight_VD.device
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, head.vocab_size, (1, _PROBE_TOKENS), generator=draw).repeat(2, 1)
    ids_BT[1, -1] = (ids_BT[1, -1] + 1) % head.vocab_size
    ids_BT = ids_BT.to(device)
    mask_BT = torch.ones_like(ids_BT)
    was_training = model.training
    model.eval()
    try:
        hidden_BTD = decoder_of(model)(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        expected = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[..., : head.vocab_size]
    finally:
        model.train(was_training)
    got = project(head, hidden_BTD)
    largest = expected.abs().max().item()
    allowed = tolerance(head.weight_VD.dtype) * max(largest, 1e-6)
    gap = (got.float() - expected.float()).abs().max().item()
    name = type(model).__name__
    if not torch.isfinite(expected).all():
        raise LimbeckError(f"{name} gives NaN or infinite logits on plain tokens; its weights are damaged or overflow")
    if not gap <= allowed:
        raise LimbeckError(
            f"the output head of {name} is not understood: logits made of its hidden states differ by {gap:.3g} "
            f"(largest logit {largest:.3g}); this architecture is not supported"
        )
    if not torch.allclose(expected[0, :-1], expected[1, :-1], rtol=0, atol=allowed):
        raise LimbeckError(f"{name} sees future tokens, so it is no causal language model; choose a decoder-only model")
