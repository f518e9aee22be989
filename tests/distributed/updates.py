"""Trainings that two processes must end where one ends: the same students, teacher and rows for both.

In float64, so that what is left of a difference is no rounding: sums of other shapes round otherwise, and AdamW
divides small by small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from limbeck.objectives import AdaptiveTemperature, Temperature, build_objective
from limbeck.objectives.sequence.rules import MiniLLM
from limbeck.student.build import StudentSpec, build_student
from limbeck.student.quantizing import QuantizeSpec, quantized
from limbeck.training.loss import LossPlan
from tests.training.play import play, settings, tiny_corpus, tiny_lora, tiny_model, tiny_responses, tiny_teacher

EXACT = torch.float64
UPDATES = ("tied", "untied", "short", "lora", "recomputed", "quantised", "text", "text lora", "whitened", "adapted")


def play_update(name: str, folder: Path, model: Path, *, ranks: int = 1, **changes: Any) -> nn.Module:
    """Play a training in `folder`; of the steps' eight rows each of the ranks takes its part."""
    students: dict[str, Callable[[], nn.Module]] = {
        "tied": lambda: tiny_model(1, dtype=EXACT),
        "untied": lambda: tiny_model(1, tied=False, dtype=EXACT),
        "short": lambda: tiny_model(1, dtype=EXACT),
        "lora": lambda: tiny_lora(1, dtype=EXACT),
        "text": lambda: tiny_model(1, dtype=EXACT),
        "text lora": lambda: tiny_lora(1, dtype=EXACT),
        "whitened": lambda: tiny_model(1, dtype=EXACT),
        "adapted": lambda: tiny_model(1, dtype=EXACT),
        "quantised": lambda: _quantised(tiny_model(1)),
        "recomputed": lambda: build_student(
            StudentSpec(model=str(model), gradient_checkpointing=ranks > 1)
        ).model.double(),
    }
    # Half of them in two microbatches.
    parts = 2 if ranks > 1 and name not in ("tied", "short") else 1
    cut = {"per_device_train_batch_size": 8 // ranks // parts, "gradient_accumulation_steps": parts}
    # 11 rows: the second step of an epoch has three, and nothing for the second rank.
    short = {"max_steps": None, "num_train_epochs": 2.0} if name == "short" else {}
    more: dict[str, Any] = {}
    if name.startswith("text"):
        more["corpus"] = tiny_corpus(rows=4 // ranks // parts)
    if name == "whitened":
        both = build_objective("sum", parts=["rkl", "policy_gradient"])
        more["loss_plan"] = LossPlan(objective=both, rule=MiniLLM(whiten=True))
        # The last step of an epoch has nothing for the second rank.
        short, more["temperature"] = {"max_steps": None, "num_train_epochs": 2.0}, 1.0
    if name == "adapted":
        more["temperature"] = Temperature(adapt=AdaptiveTemperature())
        short = {"max_steps": None, "num_train_epochs": 2.0}
    return play(
        students[name](),
        folder,
        settings(**cut, **short, **changes),
        responses=tiny_responses(11) if short else None,
        teacher=tiny_teacher(dtype=EXACT),
        **more,
    )


def _quantised(model: PreTrainedModel) -> nn.Module:
    """Trained straight through the rounding of its weights."""
    quantized(model, QuantizeSpec(format="q4_0"))
    return model.double()


def uneven() -> nn.Module:
    """Tensors whose rows two ranks cannot share evenly, and some of a single row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes of weights, gradients and moments that this process has after each update inside the block."""
    kept: list[int] = []

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        held += [p.grad for p in held if p.grad is not None]
        held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        kept.append(sum(part.numel() * part.element_size() for part in map(local_part, held)))

    hook = register_optimizer_step_post_hook(count)
    try:
        yield kept
    finally:
        hook.remove()


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
