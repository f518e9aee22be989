"""Blank assets: a small untrained Llama with the first tokens of another asset's vocabulary, to train from scratch.

A vocabulary of 49,152 would be most of a model of a few million parameters. A byte-level BPE tokenizer cut after its
first merges is one again, with longer encodings: merges are in the order in which they were learned, and every byte is
a token.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.models.quiet import quiet_transformers
from limbeck.runtime.records import fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Blank:
    """An untrained model.

    Attributes:
        base: the asset whose tokenizer is cut and whose architecture is made small.
        vocab_size: tokens that are kept.
        hub_id: None; no hub has it.
    """

    name: str
    base: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    context_length: int
    license: str
    hub_id: None = None
    megabytes: int = 14

    @property
    def sha256(self) -> str:
        """Hash of the recipe of the model, so that each one has its own place in the cache."""
        return fingerprint(asdict(self))


BLANK_4K = Blank(
    name="blank-4k",
    base="smollm2-135m-instruct",
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    context_length=512,
    license="apache-2.0",
)
# The bytes and hardly more, so that a digit is a token: for tasks whose text a program makes.
BLANK_BYTES = replace(
    BLANK_4K,
    name="blank-bytes",
    vocab_size=288,
    hidden_size=128,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=4,
    megabytes=6,
)


def write_blank(blank: Blank, base: Path, into: Path) -> None:
    """Tokenizer, configuration and fresh weights (seed 0) into a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        AutoTokenizer.from_pretrained(base).save_pretrained(into)
        path = into / "tokenizer.json"
        path.write_text(
            json.dumps(cut(json.loads(path.read_text("utf-8")), blank.vocab_size), ensure_ascii=False), "utf-8"
        )
        tokenizer = AutoTokenizer.from_pretrained(into)
        tokenizer.model_max_length = blank.context_length
        tokenizer.save_pretrained(into)
        config = AutoConfig.from_pretrained(base)
        changes = {
            "vocab_size": blank.vocab_size,
            "hidden_size": blank.hidden_size,
            "intermediate_size": blank.intermediate_size,
            "num_hidden_layers": blank.num_hidden_layers,
            "num_attention_heads": blank.num_attention_heads,
            "num_key_value_heads": blank.num_key_value_heads,
            "head_dim": blank.hidden_size // blank.num_attention_heads,
            "max_position_embeddings": blank.context_length,
        }
        for key, value in changes.items():
            setattr(config, key, value)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(into)


def cut(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """The JSON of a byte-level BPE tokenizer with its first `size` tokens and the merges that make them."""
    model = tokenizer["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < size}

    def makes(merge: Any) -> str:
        return "".join(merge if isinstance(merge, list) else merge.split(" "))

    merges = [merge for merge in model["merges"] if makes(merge) in kept]
    added = [token for token in tokenizer["added_tokens"] if token["id"] < size]
    return tokenizer | {"added_tokens": added, "model": model | {"vocab": kept, "merges": merges}}
