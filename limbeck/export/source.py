"""Sources of an export: a run's student, a model by name, or a LoRA adapter merged into its base model."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from limbeck.models.folders import holds_whole_weights, is_own, read_json_object, require_regular_files
from limbeck.models.headers import safetensors_header
from limbeck.models.loading import DTYPES, load_model, source_config, source_tokenizer
from limbeck.models.quantization.files import QuantizedWeights, read_blocks
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.models.sources import Source, resolve
from limbeck.recipe.yaml_text import parse
from limbeck.runtime.outputs import faults, matching
from limbeck.runtime.rundir import RunDirectory
from limbeck.student.saving import merged_state
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LARGEST_RANK = 65_536
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A model to export.

    Attributes:
        name: what the exported model is called.
        model: plain, float32, nothing to merge.
        original: what logits are compared with: the model before anything was merged.
        dtype: the precision it was stored in.
        card: text of its README.md; empty where it has none.
        licences: files to hand on.
        quantized: the blocks that the weights, or those below the adapters, were trained as; None where there are none.
        folder: where the weights lie; None where they lie in no folder of their own.
    """

    name: str
    model: PreTrainedModel
    original: nn.Module
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    card: str
    licences: tuple[Path, ...]
    quantized: QuantizedWeights | None = None
    folder: Path | None = None


def find(source: str, *, trust_remote_code: bool = False) -> Exportable:
    """Load the model to be exported.

    Args:
        source: a run directory, a PEFT directory, or anything `limbeck.models.loading.load_model` takes.

    Raises:
        LimbeckError: a run without a finished student, or no such model.
    """
    path = Path(source).expanduser()
    if (path / "recipe.resolved.yaml").is_file():
        return _of_run(path, trust_remote_code)
    if (path / "adapter_config.json").is_file():
        return _merged(path, trust_remote_code)
    folder = resolve(source, weights=False, trust_remote_code=trust_remote_code).directory
    name = (path.resolve() if path.exists() else path).name.removesuffix(".gguf")
    return _exportable(source, name, (folder,), trust_remote_code)


def _of_run(run: Path, trust_remote_code: bool) -> Exportable:
    directory = RunDirectory(run)
    student = directory.finished_student
    if not (student / "config.json").is_file():
        raise LimbeckError(f"{run} has no finished student, expected {student}; end it with `limbeck run {run}`")
    stage = "train" if student == directory.student else "prefer"
    written = (directory.manifest(stage) or {}).get("outputs", {})
    fault = next(iter(faults(run, matching(written, [f"{student.name}/*"]), content=True).items()), None)
    if fault is not None:
        raise LimbeckError(
            f"{run / fault[0]} {fault[1]} since it was written; make it again with `limbeck run {run}`, or export "
            f"{student} as it stands"
        )
    return _exportable(student, run.resolve().name, (student, *_origins(run)), trust_remote_code)


def _origins(run: Path) -> list[Path]:
    """Local folders of the models that the student's weights began as, and of the teacher: their licences hold on."""
    path = run / "recipe.resolved.yaml"
    try:
        recipe = parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError:
        raise LimbeckError(f"{path} is not UTF-8 text; run it again, or export {run / 'student'}") from None
    sections = [recipe.get(name) for name in ("student", "teacher")] if isinstance(recipe, dict) else []
    names = [section.get("model") for section in sections if isinstance(section, dict)]
    sources = [resolve(name, weights=False) for name in names if isinstance(name, str) and _is_here(name)]
    return [source.directory for source in sources]


def _is_here(name: str) -> bool:
    """Whether a model can be found without a network."""
    from limbeck.models.assets import ASSETS

    return name in ASSETS or os.path.exists(os.path.expanduser(name))  # which never raise, whatever the name


def _merged(folder: Path, trust_remote_code: bool) -> Exportable:
    from peft import PeftModel

    base = _base_of(folder)
    loaded = load_model(base, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            # transformers has renamed an attribute that PEFT reads.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(loaded.model, folder).eval()
    except Exception as error:  # PEFT raises whatever its many kinds of adapters raise over fields of the file
        raise LimbeckError(
            f"{folder} cannot be put onto its base model {base}: {one_line(error)}; "
            "check base_model_name_or_path in its adapter_config.json"
        ) from error
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = loaded.tokenizer
    if own:
        beside = Source(name=str(folder), kind="directory", directory=folder)
        tokenizer = source_tokenizer(beside, trust_remote_code=trust_remote_code)
    return Exportable(
        name=folder.resolve().name,
        model=_plain(adapted, base, trust_remote_code),
        original=adapted,
        tokenizer=tokenizer,
        dtype=_stored(base, trust_remote_code),
        card=_card(folder),
        licences=_licences((folder, resolve(base, weights=False, trust_remote_code=trust_remote_code).directory)),
    )


def _base_of(folder: Path) -> str:
    """The base model of an adapter, whose files have been looked through.

    Raises:
        LimbeckError: no plain LoRA in safetensors, or files that are not what they should be.
    """
    path = folder / "adapter_config.json"
    require_regular_files(folder)
    config = read_json_object(path)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise LimbeckError(f"{path} names no base model, expected base_model_name_or_path; add it")
    # Megatron's option is the name of a module that PEFT would import.
    if config.get("peft_type") != "LORA" or config.get("megatron_config") is not None:
        raise LimbeckError(
            f"{path}: peft_type is {str(config.get('peft_type'))[:40]!r}, expected LORA without megatron_config; "
            "merge other adapters with PEFT itself"
        )
    rank = config.get("r")
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise LimbeckError(f"{path}: r is {str(rank)[:40]!r}, expected a whole number from 1 to {_LARGEST_RANK}")
    if holds_whole_weights(folder):
        raise LimbeckError(
            f"{folder} holds whole weights and an adapter, so which of the two is meant is not clear; "
            "move adapter_config.json or the weights elsewhere"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise LimbeckError(
            f"{folder} has no adapter_model.safetensors; adapters in .bin are pickles, which can run code when opened: "
            "convert one that you trust with PEFT's save_pretrained"
        )
    safetensors_header(folder / "adapter_model.safetensors")
    return base


def _plain(adapted: nn.Module, base: str, trust_remote_code: bool) -> PreTrainedModel:
    """A model of its own with the adapters in its weights."""
    model = load_model(base, trust_remote_code=trust_remote_code).model
    model.load_state_dict(merged_state(adapted))
    return model


def _exportable(source: str | Path, name: str, folders: tuple[Path, ...], trust_remote_code: bool) -> Exportable:
    loaded = load_model(source, trust_remote_code=trust_remote_code)
    is_folder = loaded.provenance.kind != "gguf"
    return Exportable(
        name=name,
        model=loaded.model,
        original=loaded.model,
        tokenizer=loaded.tokenizer,
        dtype=_stored(source, trust_remote_code),
        card=_card(folders[0]),
        licences=_licences(folders),
        quantized=read_blocks(folders[0]) if is_folder else None,
        folder=folders[0],
    )


def _stored(name: str | Path, trust_remote_code: bool) -> torch.dtype:
    """Of the weights on disk: what loads as float32 may have been kept in less."""
    source = resolve(name, weights=False, trust_remote_code=trust_remote_code)
    dtype = source_config(source, trust_remote_code=trust_remote_code).dtype
    if source.gguf is None and isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    return torch.float32


def _card(folder: Path) -> str:
    path = folder / "README.md"
    if not path.is_file() or not is_own(path, folder):
        return ""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise LimbeckError(f"{path} is no UTF-8 text ({error.reason}); mend or remove it") from error
    return text


def _licences(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """Of the first folder that has any: the student's own, else those of what it was made from."""
    for folder in folders:
        named = {path for pattern in _LICENCES for path in folder.glob(pattern)}
        if found := sorted(path for path in named if path.is_file() and is_own(path, folder)):
            return tuple(found)
    return ()
