"""Saving a student so that anybody's transformers loads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from limbeck.models.heads import causal_model
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.runtime.rundir import whole_folder
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_student(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> Path:
    """Write a directory that plain `AutoModelForCausalLM.from_pretrained(directory)` loads. The model is not changed.

    Adapters are merged into the weights. The directory appears whole: what stood there before is replaced at the end.

    Raises:
        LimbeckError: the disk is full or not writable, or the adapter cannot be merged.
    """
    directory = Path(directory)
    try:
        with whole_folder(directory) as work, quiet_transformers():
            causal_model(model).save_pretrained(work, state_dict=merged_state(model))
            _plain(tokenizer).save_pretrained(work)
    except OSError as error:
        raise LimbeckError(
            f"cannot write the student to {directory}: {error.strerror or one_line(error)}; "
            "free space or choose another directory"
        ) from error
    except UnicodeEncodeError as error:
        raise LimbeckError(
            f"the tokenizer of {tokenizer.name_or_path}, or the model's configuration, holds half a surrogate pair, "
            "which no file can hold; download the model again"
        ) from error
    return directory


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model a LoRA model is equal to: ``W + scaling * B @ A``. Nothing is changed in place.

    Raises:
        LimbeckError: an adapter other than plain LoRA.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inner = causal_model(model)
    state = inner.state_dict()
    for name, module in inner.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]].state_dict()
            state = _without(state, name) | {f"{name}.{key}": value for key, value in trained.items()}
        elif isinstance(module, BaseTunerLayer):
            if not isinstance(module, LoraLinear) or module.lora_variant or module.merged:
                raise LimbeckError(f"cannot merge the adapter at {name} ({type(module).__name__}); use plain LoRA")
            base = module.get_base_layer().state_dict()
            delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
            base["weight"] = (base["weight"].float() + delta).to(base["weight"].dtype)
            state = _without(state, name) | {f"{name}.{key}": value for key, value in base.items()}
    return state


def _without(state: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(f"{module}.")}


def _plain(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy without the padding and truncation of its last call, which would be saved with it."""
    plain = copy.deepcopy(tokenizer)
    if plain.is_fast:
        backend: Any = plain.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        backend.no_padding()
        backend.no_truncation()
    return plain
