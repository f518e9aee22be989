"""Tiny models and tokenizers with random weights, made on the spot: no file, no network."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

REAL, ROWS, DEPTH = 40, 48, 5
_SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OTHER: dict[str, Any] = {"vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, attention_dropout=0.1),
    "mistral": lambda: MistralConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=8, sliding_window=4, final_logit_softcapping=5.0),
    "cohere": lambda: CohereConfig(**_SIZES, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**_SIZES, logits_scaling=8.0),
    "phi": lambda: PhiConfig(**_SIZES),
    "gpt2": lambda: GPT2Config(**_OTHER, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(
        **_OTHER, hidden_size=32, ffn_dim=48, num_hidden_layers=DEPTH, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "falcon": lambda: FalconConfig(**_OTHER, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4),
}


def tiny_model(family: str = "llama", seed: int = 0) -> Any:
    """Weights are drawn wide, so that soft-caps and scales show."""
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=draw)
    return model


def tiny_tokenizer(words: int = REAL - 3, swap: tuple[int, int] | None = None) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... behind three special tokens; `swap` exchanges two ids."""
    tokens = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(words))]
    if swap is not None:
        a, b = swap
        tokens[a], tokens[b] = tokens[b], tokens[a]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def save_tiny(folder: Path, family: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A model directory as save_pretrained writes it."""
    tiny_model(family).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_gguf(
    path: Path,
    model: Any,
    architecture: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    tied: bool = False,
    fields: Mapping[str, int | float | str] | None = None,
    without: Collection[str] = (),
    beside: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A llama model as an unquantised GGUF file, as llama.cpp's converter lays it out.

    Args:
        tokenizer: a byte-level BPE; without one the file knows little more than the letters.
        tied: leave the head out, so that the embeddings are it.
        fields: more of them.
        without: the names of tensors that are left out.
        beside: more tensors.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens, merges = ["<pad>", "<s>", "</s>", "ab", *"abcdefghijklmnopqrstuvwxyz"], ["a b"]
    if tokenizer is not None:
        ids = tokenizer.get_vocab()
        tokens = sorted(ids, key=ids.__getitem__)
        merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
        writer.add_chat_template(str(tokenizer.chat_template))
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (fields or {}).items():
        kinds[type(value)](key, value)  # type: ignore[operator]
    for name, weight in [*_gguf_tensors(model), *(beside or {}).items()]:
        if name in without or (tied and name == "output.weight"):
            continue
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensors(model: Any) -> list[tuple[str, np.ndarray]]:
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    parts |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    found = [
        ("token_embd.weight", state["model.embed_tokens.weight"]),
        ("output_norm.weight", state["model.norm.weight"]),
        ("output.weight", state["lm_head.weight"]),
    ]
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in parts.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:
                # llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
                width, columns = weight.shape
                weight = weight.reshape(heads[theirs], 2, width // heads[theirs] // 2, columns)
                weight = weight.swapaxes(1, 2).reshape(width, columns)
            found.append((f"blk.{layer}.{theirs}.weight", weight))
    return found
