"""Saving a student as a plain transformers model."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.models.heads import causal_model
from limbeck.models.processors import PROCESSOR_FILES
from limbeck.models.quantization.files import save_blocks
from limbeck.models.quantization.on_grid import save_grids
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.models.slices import write_slices
from limbeck.models.vision import reader_of
from limbeck.runtime.files import whole_folder
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from limbeck.student.quantizing import Quantization


def save_student(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    quantization: Quantization | None = None,
    for_slices: bool = False,
) -> Path:
    """Write a directory that plain `AutoModelForCausalLM.from_pretrained(directory)` loads. The model is not changed.

    Adapters are merged into the weights, and weights on a grid are written as the floats they stand for; the blocks of
    `quantization` lie below, and with them the adapters that a merged weight no longer shows. The directory appears
    whole: what stood there before is replaced at the end.

    Args:
        for_slices: write the weights as they are in memory, so that each rank can read its part of every architecture:
            floats that are trained as such, with the grids that they are computed with below.

    Raises:
        LimbeckError: the disk is full or not writable, or the adapter cannot be merged.
    """
    directory = Path(directory)
    try:
        with whole_folder(directory) as work, quiet_transformers():
            if for_slices:
                write_slices(causal_model(model), merged_state(model, rounded=False), work)
            else:
                causal_model(model).save_pretrained(work, state_dict=merged_state(model))
            _plain(tokenizer).save_pretrained(work)
            _copy_processor(model, work)
            if quantization is not None:
                if for_slices and quantization.weights == "straight_through":
                    save_grids(work, causal_model(model), quantization.formats)
                else:
                    save_blocks(work, quantization.packed(model))
                if quantization.weights == "frozen" and not for_slices:
                    _save_adapters(model, work / "quantized")
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


def _copy_processor(model: nn.Module, folder: Path) -> None:
    """The files of an image-text model's processor, as they came, beside it."""
    if (reader := reader_of(model)) is not None:
        for name in PROCESSOR_FILES:
            if (reader.files / name).is_file():
                shutil.copyfile(reader.files / name, folder / name)


def merged_state(model: nn.Module, *, rounded: bool = True) -> dict[str, Tensor]:
    """The state dict of the plain model that a model with LoRA (``W + scaling * B @ A``), or with weights on a grid, is
    equal to. Nothing is changed in place.

    Args:
        rounded: of weights on a grid what is computed with, rather than the floats that are trained.

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
        elif parametrize.is_parametrized(module, "weight"):
            weight: Any = module.weight if rounded else module.parametrizations["weight"].original  # type: ignore[index]
            state = _without(state, f"{name}.parametrizations.weight") | {f"{name}.weight": weight.detach()}
    return state


def _save_adapters(model: nn.Module, folder: Path) -> None:
    """The adapters alone, as PEFT writes them."""
    from peft import PeftModel

    assert isinstance(model, PeftModel)
    with warnings.catch_warnings():
        # PEFT looks for the base model's files, which are nowhere.
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)


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
