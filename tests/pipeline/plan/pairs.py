"""Cases of well-known sizes, from configurations that are written here, so that no hub is needed."""

from __future__ import annotations

from typing import Any

from limbeck.models.devices import fleet_of
from limbeck.pipeline.plan.case import Case
from limbeck.pipeline.plan.sizes import ModelSize, StudentSize, size_of
from limbeck.pipeline.plan.workload import assumed_workload
from limbeck.recipe.load import load_recipe

LLAMA = {"model_type": "llama", "vocab_size": 128_256, "tie_word_embeddings": False, "max_position_embeddings": 8192}
QWEN = {"model_type": "qwen2", "vocab_size": 152_064, "tie_word_embeddings": False, "max_position_embeddings": 32_768}
CONFIGS: dict[str, dict[str, Any]] = {
    "1.5B": QWEN
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7B": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "32B": QWEN
    | {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40, "num_key_value_heads": 8},
    "70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
}


def model_of(config: dict[str, Any]) -> ModelSize:
    """The size of a model of this configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    made = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        return size_of(AutoModelForCausalLM.from_config(made))


def case_of_sizes(teacher: ModelSize, student: ModelSize, devices: str, /, **sections: dict[str, Any]) -> Case:
    """50,000 prompts of 200 tokens, answers of 512; bfloat16 products, float32 weights and moments."""
    tree: dict[str, Any] = {
        "teacher": {"model": "teacher", "dtype": "bfloat16", "cache_dtype": "bfloat16"},
        "student": {"model": "student"},
        "responses": {"source": "data", "max_new_tokens": 512},
        "train": {"bf16": True, "learning_rate": 1e-5, "per_device_train_batch_size": 4, "save_steps": 1000},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    fleet = fleet_of(devices)
    return Case(
        recipe=load_recipe(tree),
        student=StudentSize(model=student, trained=student.parameters, adapters=0, number_bytes=4),
        teacher=teacher,
        work=assumed_workload(prompts=50_000, prompt_tokens=200, answer=512, heldout=0.02),
        fleet=fleet,
        where="in_process",
        sharded=fleet.count > 1,
    )
