"""The papers' tables as recipes: what a header says is what the recipe holds, and it says what was not run."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import pytest

from limbeck.recipe.files import shipped_recipes, shipped_sweeps
from limbeck.recipe.load import as_tree, load_recipe

PAPERS = [name for name in shipped_recipes() if name.startswith("papers/")]
SWEEPS = [name for name in shipped_sweeps() if name.startswith("papers/")]
# What the headers say, and what the recipes hold. A step's pairs are of two responses each.
LORA = {"student.lora.r": 16, "student.lora.lora_alpha": 128.0}
NO_DROPOUT = {"student.lora.lora_dropout": 0.0}
SKEWS = {
    "objective.name": "skl",
    "contrast.student.name": "srkl",
    "objective.alpha": 0.1,
    "contrast.student.alpha": 0.1,
}
ALPHA = {
    "contrast.rule.name": "adaptive_alpha",
    "contrast.rule.alpha0": 0.1,
    "contrast.rule.low": 0.01,
    "contrast.rule.high": 0.1,
    "contrast.rule.warmup_epochs": 1,
}
SAWTOOTH = {"contrast.beta": "sawtooth", "contrast.beta_start": 0.5, "contrast.beta_end": 1.0, "contrast.scale": 0.5}
SAMPLED = {"responses.temperature": 0.8, "responses.top_p": 0.95}
ANEW = {
    "responses.source.name": "pairs",
    "responses.source.refresh": "epoch",
    "responses.source.resample_teacher": True,
}
COSINE = {"train.lr_scheduler_type": "cosine", "train.warmup_ratio": 0.1}
FROM_TABLE_2 = {**SKEWS, **ALPHA, **SAWTOOTH, **SAMPLED, **ANEW, **COSINE, **LORA, **NO_DROPOUT}
SAID: dict[str, dict[str, dict[str, Any]]] = {
    "papers/csd-table1": {
        "CSD with student weights on both sides": {"objective.name": "csd", "objective.temperature": 1.0},
        "on the data's answers, no first stage": {"responses.source.name": "data", "sft": None},
        "no language-modelling loss": {"train.lm": None},
        "lr 1e-4, cosine": {"train.learning_rate": 1e-4, "train.lr_scheduler_type": "cosine"},
        "batch 8, 20 epochs": {"responses of a step": 8, "train.num_train_epochs": 20},
        "weight decay 0.01, clipping at 1, seed 10": {
            "train.weight_decay": 0.01, "train.max_grad_norm": 1.0, "train.seed": 10,
        },
        "five decoding seeds": {"evaluate.groups.rouge.seeds": [10, 20, 30, 40, 50]},
    },
    "papers/csd-table2": {
        "an SFT stage on Dolly (3 epochs, lr 5e-4": {"sft.num_train_epochs": 3, "sft.learning_rate": 5e-4},
        "CSD with student weights": {
            "objective.name": "csd", "objective.first": "student", "objective.second": "student",
        },
        "responses that the student writes at every step": {
            "responses.source.name": "student", "responses.source.refresh": None, "responses.source.temperature": 1.0,
        },
        "2 to the whole that is csd here": {"train.lm.weight": 2.0},
        "lr 5e-4, batch 32, 20 epochs": {
            "train.learning_rate": 5e-4, "responses of a step": 32, "train.num_train_epochs": 20,
        },
    },
    "papers/csd-table3": {
        "CSD with teacher and student weights": {"objective.first": "teacher", "objective.second": "student"},
        "lr 1e-5, linear, no warm-up": {
            "train.learning_rate": 1e-5, "train.lr_scheduler_type": "linear", "train.warmup_ratio": 0.0,
        },
        "8 answers a step, mean over tokens, then over answers": {
            "responses of a step": 8, "train.reduction": "sequence",
        },
        "3 epochs, seed 20": {"train.num_train_epochs": 3, "train.seed": 20},
        "up to 512 tokens": {"evaluate.groups.tasks.max_new_tokens": 512},
    },
    "papers/csd-table4": {
        "T 0.8, top-p 0.95, up to 1,024 tokens": {**SAMPLED, "responses.max_new_tokens": 1024},
        "never written anew": {"train.num_train_epochs": 1, "responses.source.resample_teacher": False},
        "LoRA r 16, alpha 128": LORA,
        "dropout is switched off there, and here": NO_DROPOUT,
        "lr 5e-5, cosine, warm-up 0.1, one epoch": {
            **COSINE, "train.learning_rate": 5e-5, "train.num_train_epochs": 1,
        },
        "128 pairs a step, seed 42": {"responses of a step": 256, "train.seed": 42},
        "No SFT": {"sft": None},
    },
    "papers/distillm2-table2": {
        "SFT on the data's answers": {"sft.source": "data", "sft.num_train_epochs": 1},
        "three epochs, before each of which both models answer all prompts anew": {**ANEW, "train.num_train_epochs": 3},
        "T 0.8, top-p 0.95": SAMPLED,
        "skew KL and skew reverse KL, alpha 0.1": SKEWS,
        "by response from the second epoch on": ALPHA,
        "a saw-tooth from 0.5 to 1": SAWTOOTH,
        "LoRA r 16": LORA,
        "without dropout": NO_DROPOUT,
        "lr 5e-5, cosine, warm-up 0.1": {**COSINE, "train.learning_rate": 5e-5},
        "128 pairs a step": {"responses of a step": 256},
        "50,000 prompts": {"prompts.limit": 50000},
    },
    "papers/distillm2-table3": {
        "as papers/distillm2-table2": {**FROM_TABLE_2, "train.learning_rate": 5e-5, "responses of a step": 256},
        "two epochs on 50,000 prompts": {"train.num_train_epochs": 2, "prompts.limit": 50000},
        "an epoch of SFT on its answers": {"sft.source": "data", "sft.num_train_epochs": 1},
    },
    "papers/distillm2-table4": {
        "as papers/distillm2-table2": {**FROM_TABLE_2, "train.learning_rate": 5e-5, "responses of a step": 256},
        "two epochs": {"train.num_train_epochs": 2},
        "lr 5e-6, linear, 5 epochs": {"sft.learning_rate": 5e-6, "sft.num_train_epochs": 5},
    },
    "papers/distillm2-table6": {
        "papers/distillm2-table2, key by key": {**FROM_TABLE_2, "train.num_train_epochs": 3, "train.seed": 42},
        "four times (T 0.8, top-p 0.95)": {
            "preference.pairs.samples": 4, "preference.pairs.temperature": 0.8, "preference.pairs.top_p": 0.95,
        },
        "the teacher's likelihood ranks": {"preference.pairs.name": "teacher"},
        "one epoch, lr 5e-6, beta 0.1": {
            "preference.num_train_epochs": 1, "preference.learning_rate": 5e-6, "preference.beta": 0.1,
        },
    },
    "papers/distillm2-table7": {
        "T 0.8, top-p 0.95, up to 1,024 tokens": {**SAMPLED, "responses.max_new_tokens": 1024},
        "alpha 0.1 and beta 0.5 fixed, the sum of two means": {
            **SKEWS, "contrast.rule": None,
            "contrast.beta": "constant", "contrast.beta_start": 0.5, "contrast.scale": 2.0,
        },
        "LoRA on language model, projector and vision tower": {
            "student.freeze_vision": False, "student.lora.target_modules": [],
        },
        "one epoch at lr 2e-5": {"train.num_train_epochs": 1, "train.learning_rate": 2e-5},
        "256 pairs a step": {"responses of a step": 512},
        "16 and 128, no dropout": {**LORA, **NO_DROPOUT},
        "seed 42, cosine and warm-up 0.1": {**COSINE, "train.seed": 42},
    },
    "papers/distillm2-table9": {
        "the teacher in 4 bits, frozen": {
            "student.init": "teacher", "student.quantize.format": "int4_g32", "student.quantize.weights": "frozen",
        },
        "embeddings and head in 8 bits": {"student.quantize.embeddings": "q8_0"},
        "those of papers/distillm2-table2": FROM_TABLE_2,
        "three epochs, lr 5e-5, 128 pairs a step": {
            "train.num_train_epochs": 3, "train.learning_rate": 5e-5, "responses of a step": 256, "train.seed": 42,
        },
        "without its SFT": {"sft": None},
    },
    "papers/distillm2-table10": {
        "as the students of papers/distillm2-table2 are": {**FROM_TABLE_2, "sft.source": "data"},
        "lr 5e-5, 128 pairs a step": {"train.learning_rate": 5e-5, "responses of a step": 256},
        "three epochs": {"train.num_train_epochs": 3, "train.seed": 42},
    },
}  # fmt: skip


def header(name: str) -> str:
    """The comment at the top of a recipe, as one line."""
    text = (files("limbeck.recipe") / "shipped" / f"{name}.yaml").read_text("utf-8")
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", [*PAPERS, *SWEEPS])
def test_the_header_says_what_it_would_take(name: str) -> None:
    said = header(name)
    assert re.search(r"Expected: not run here: needs about \d+ GPU hours", said)
    assert re.search(r"\(arXiv \d{4}\.\d{5}\)", said) and "The paper" in said
    assert f"papers/{name.rpartition('/')[2]}" in said.rpartition("Command:")[2]


def test_every_recipe_is_held_to_its_header() -> None:
    assert set(SAID) == set(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_holds_what_its_header_says(name: str) -> None:
    said, recipe = header(name), load_recipe(name)
    tree = as_tree(recipe)
    rows = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps
    for phrase, keys in SAID[name].items():
        assert phrase in said, f"{name}: the header no longer says {phrase!r}"
        for key, value in keys.items():
            found = rows if key == "responses of a step" else value_at(tree, key)
            assert found == value, f"{name}: {phrase}, but {key} is {found}"


def value_at(tree: dict[str, Any], key: str) -> Any:
    """What stands under a dotted key."""
    found: Any = tree
    for part in key.split("."):
        found = found[part]
    return found


def test_table_6_distils_as_table_2() -> None:
    """But for what is said of the preference tuning, and what it is measured by."""
    trees = [as_tree(load_recipe(f"papers/distillm2-table{n}")) for n in (2, 6)]
    for section in ("teacher", "student", "prompts", "responses", "objective", "contrast", "sft", "train"):
        assert trees[0][section] == trees[1][section], section
