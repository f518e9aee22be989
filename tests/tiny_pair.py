"""A tiny pair of random models, a few prompts and a recipe, written to disk: a whole run takes about a second.

The tokenizer is a real byte-level BPE with a ChatML template; the models are random, but sharp enough (a large
initializer range) that their answers differ in words and length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOPICS = ("tea", "rain", "iron", "bees", "maps", "salt", "moss", "wind", "glass", "bread", "tides", "clocks")
QUESTIONS = ("What is {}?", "Name three uses of {} and say which one is the oldest.")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def questions(count: int = 24) -> list[str]:
    """Distinct short instructions."""
    every = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    return [every[i % len(every)] + ("" if i < len(every) else f" ({i})") for i in range(count)]


def write_tokenizer(folder: Path, *, extra: Sequence[str] = (), chat: bool = True) -> int:
    """Train and save the tokenizer; returns the number of its ids.

    Args:
        extra: further training text, which gives another vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*questions(), *extra], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return max(tokenizer.get_vocab().values()) + 1


def write_model(
    folder: Path,
    *,
    family: str = "llama",
    layers: int = 3,
    width: int = 32,
    head_rows: int | None = None,
    window: int = 128,
    seed: int = 0,
    extra: Sequence[str] = (),
    chat: bool = True,
) -> Path:
    """A model directory in the ecosystem's form.

    Args:
        head_rows: rows of the embeddings; more than the tokenizer has ids makes a padded head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = write_tokenizer(folder, extra=extra, chat=chat)
    config = AutoConfig.for_model(
        family,
        vocab_size=head_rows or ids,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.4,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def poison(folder: Path, value: float = float("nan")) -> Path:
    """Put a NaN, or another number, into the weights of a model directory."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def silence(folder: Path) -> Path:
    """Make a model that ends every answer at once: all it sees is the last token, and what follows is the end."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    last = tokenizer("<|im_start|>assistant\n")["input_ids"][-1]
    embedding_VD = weights["model.embed_tokens.weight"]
    embedding_VD[tokenizer.eos_token_id] = 20 * embedding_VD[last]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def mute_end(folder: Path) -> Path:
    """Make a model that never ends an answer: whatever it sees, the end is the least likely token."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    # With nothing added by any block, the logits are those of the last token's own embedding: all lean one way.
    embedding_VD = weights["model.embed_tokens.weight"]
    embedding_VD[:, 0] = 10.0
    embedding_VD[AutoTokenizer.from_pretrained(folder).eos_token_id, 0] = -10.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_prompts(path: Path, rows: Sequence[dict[str, Any]] | None = None) -> Path:
    """A JSONL of prompts."""
    chosen = [{"prompt": text} for text in questions()] if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf-8")
    return path


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    """A recipe file."""
    import yaml

    path.write_text(yaml.safe_dump(tree, sort_keys=False), "utf-8")
    return path


@dataclass(frozen=True)
class TinyPair:
    """A teacher and prompts on disk."""

    teacher: Path
    prompts: Path

    @classmethod
    def write(cls, folder: Path) -> TinyPair:
        return cls(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl"))

    def tree(self, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
        """A recipe that prunes the teacher to two blocks and trains it for 12 steps; sections are merged over it."""
        tree: dict[str, Any] = {
            "name": "tiny",
            "output_dir": str(output),
            "teacher": {"model": str(self.teacher)},
            "student": {"init": "depth_prune", "layers": 2},
            "prompts": {"source": str(self.prompts), "eval_fraction": 0.25},
            "responses": {"max_new_tokens": 12, "batch_size": 4},
            "objective": {"name": "fkl", "temperature": 2.0},
            "train": {
                "max_steps": 12,
                "per_device_train_batch_size": 4,
                "learning_rate": 1.0e-3,
                "save_steps": 2,
                "compile": "off",
            },
            "evaluate": {"max_new_tokens": 8, "samples": 2},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        return tree

    def recipe(self, output: Path, **sections: dict[str, Any]) -> Path:
        """The same as a file beside the run directory."""
        return write_recipe(output.with_suffix(".yaml"), self.tree(output, **sections))
