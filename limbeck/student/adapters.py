"""Low-rank adapters: the layers that can have them, and the model with them."""

from __future__ import annotations

import difflib
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from limbeck.models.quiet import one_line
from limbeck.models.slices import is_unread, stand_ins
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters (Hu et al. 2021): ``W + (lora_alpha / r) * B @ A`` with A, B trained and W frozen.

    Attributes:
        target_modules: names of the layers to adapt; empty for every linear layer but the output head.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ()


def check_adapters(model: PreTrainedModel, lora: LoraSpec) -> None:
    """Every target names linear layers below the output head. No weights are read, so a model on "meta" will do.

    Raises:
        LimbeckError: names what there is instead.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    fitting = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    for target in lora.target_modules:
        # peft's own rule. It is content where one of several targets is found, and leaves the others out.
        named = {n for n, _ in model.named_modules() if n == target or n.endswith(f".{target}")}
        if not named or not named <= fitting:
            ends = sorted({name.rpartition(".")[2] for name in fitting})
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise LimbeckError(
                f"LoRA cannot be put on {target!r}{hint}: in {type(model).__name__} the linear layers are "
                f"{', '.join(ends)}; name some of them, or leave student.lora.target_modules empty for all"
            )


def with_adapters(
    model: PreTrainedModel, lora: LoraSpec, seed: int, *, left_alone: nn.Module | None = None
) -> nn.Module:
    """The model under fresh adapters, its own weights frozen.

    Args:
        left_alone: a part of it that gets none.

    Raises:
        LimbeckError: as `check_adapters`.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    check_adapters(model, lora)
    alone = set() if left_alone is None else set(left_alone.modules())
    excluded = [name for name, module in model.named_modules() if module in alone] or None
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.lora_dropout,
        # "all-linear" leaves the output head out.
        target_modules=list(lora.target_modules) or "all-linear",
        exclude_modules=excluded,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        # peft would put adapters beside weights without values, and lose what it drew.
        seen = stand_ins(model) if is_unread(model) else nullcontext()
        with seen, torch.random.fork_rng(), warnings.catch_warnings():
            # peft asks transformers by names that transformers has renamed; nothing the user could change.
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        raise LimbeckError(
            f"LoRA cannot be put on {type(model).__name__}: {one_line(error)}; change student.lora"
        ) from error
