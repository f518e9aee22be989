"""Provenance of a run: versions, code revision, machine, launch, fingerprints and seeds."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Container
from functools import cache
from importlib import metadata
from pathlib import Path

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.hosted_responses import paid_record
from limbeck.recipe.load import Recipe
from limbeck.types import Json


def provenance(context: RunContext, prints: dict[str, str]) -> Json:
    """Versions, code revision, machine, fingerprints and seeds of this run. No names of people or hosts."""
    import torch

    recipe = context.recipe
    packages = ("limbeck", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "rouge-score")
    return paid_record(context) | {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "code_revision": code_revision(),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "device": str(context.device),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        },
        "launch": context.launch.record(*step_batch(recipe, prints)),
        "fingerprints": {"teacher": context.teacher_fingerprint} | {f"stage {name}": p for name, p in prints.items()},
        "seeds": {"responses": recipe.responses.seed, "train": recipe.train.seed, "split": recipe.prompts.split_seed},
    }


def step_batch(recipe: Recipe, stages: Container[str]) -> tuple[int, ...]:
    """Responses per device and accumulated micro-batches of a step; nothing where none of the stages trains."""
    train = recipe.train
    return (train.per_device_train_batch_size, train.gradient_accumulation_steps) if "train" in stages else ()


@cache
def code_revision() -> str | None:
    """The git commit of limbeck's own source when this process began, where it runs from a checkout; else None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
