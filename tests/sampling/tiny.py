"""Tiny random models and prompts for the sampler's tests: no download, milliseconds a forward pass."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from limbeck.sampling.local import LocalSampler
from limbeck.types import TokenPrompt

VOCAB = 61
EOS = 5

_SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
    "use_cache": True,
}
_WINDOW = {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "gemma2": {**_WINDOW, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
# Gemma 2 runs on transformers' eager attention, which in float64 makes NaN of left padding (in `generate` as well).
IN_DOUBLE = tuple(family for family in FAMILIES if family != "gemma2")


def config_of(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**_SHARED, **FAMILIES[family]})


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_prompts(count: int = 7, seed: int = 1, longest: int = 20) -> list[TokenPrompt]:
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draws).tolist()
    return [
        TokenPrompt(id=f"p{i}", ids=tuple(torch.randint(6, VOCAB, (length,), generator=draws).tolist()))
        for i, length in enumerate(lengths)
    ]


def sampler_of(model: PreTrainedModel, *, batch_size: int = 4, keep_logp: bool = False) -> LocalSampler:
    return LocalSampler(
        model=model,
        eos_token_ids=(EOS,),
        pad_token_id=0,
        vocab_size=VOCAB,
        author="teacher",
        batch_size=batch_size,
        keep_logp=keep_logp,
    )
