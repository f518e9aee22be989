"""Models that are read by slices: their weights stay in the safetensors files until each rank reads its own part.

Such a model lies on torch's meta device, buffers aside, which are computed from its configuration. What is sharded and
what is not may be decided, adapters may be put on it, and then `read_parts` fills it, one tensor after another: no rank
has more than its part and the pages of the tensor in hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from limbeck.models.fingerprints import weight_files
from limbeck.models.headers import safetensors_header
from limbeck.models.processors import auto_class, reads_images
from limbeck.models.quantization.on_grid import RowsOnGrid
from limbeck.models.sources import Source

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class _Stored:
    """The place of a tensor in a file."""

    path: Path
    name: str


# In the metadata of files: their tensors are those of the model in memory, whatever transformers saves such a model as.
_AS_IN_MEMORY = {"format": "pt", "tensors": "as in memory"}
# By the module that has them: a module stays the same one when it is sharded, or when adapters are put around it.
_UNREAD: WeakKeyDictionary[nn.Module, dict[str, _Stored]] = WeakKeyDictionary()


def is_unread(model: nn.Module) -> bool:
    """Whether weights of a model are still in its files."""
    return any(module in _UNREAD for module in model.modules())


@contextmanager
def no_weights() -> Iterator[None]:
    """A block in which models are made without weights: on the meta device, buffers aside; random numbers stay."""
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=()), init_empty_weights(include_buffers=False):
        yield


def unread_model(
    source: Source,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    attn_implementation: str,
    trust_remote_code: bool,
) -> PreTrainedModel | None:
    """A model as `from_pretrained` makes it, whose weights are still in its safetensors files.

    Returns:
        None where they cannot be read by slices: files of another kind, precisions that transformers mixes, or files
        that `write_slices` has not written of images or of tensors that transformers renames or fuses on reading.
    """
    from transformers import GenerationConfig

    written_here = source.gguf is None and _is_as_in_memory(source)
    if source.gguf is not None or (reads_images(config) and not written_here):
        return None
    with no_weights():
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    unlike = _mixes_precisions(model, dtype) or (not written_here and _is_converted(model))
    places = None if unlike else _places(source, model)
    if places is None:
        return None
    # As from_pretrained: a model without the file has what its configuration says.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source.directory)
    for name, place in places.items():
        holder, _, own = name.rpartition(".")
        _UNREAD.setdefault(model.get_submodule(holder), {})[own] = place
    return model


def take_places(model: nn.Module, whole: nn.Module, name_of: Callable[[str], str]) -> None:
    """Let a model on the meta device be read from where some weights of another one are stored, which is unread.

    Args:
        name_of: the name in `whole` of a module of `model`.
    """
    for name, module in model.named_modules():
        if (places := _UNREAD.get(whole.get_submodule(name_of(name)))) is not None:
            _UNREAD[module] = dict(places)


def take_over(module: nn.Module, name: str) -> None:
    """Let a weight that is unread be read into the parametrisation that it has got since."""
    places = _UNREAD.get(module, {})
    if (place := places.pop(name, None)) is not None:
        _UNREAD[module.parametrizations[name]] = {"original": place}  # type: ignore[index]


def is_converted(config: PretrainedConfig) -> bool:
    """Whether transformers makes other tensors of those in the files of a model."""
    with no_weights():
        return _is_converted(auto_class(config).from_config(config))


def _is_converted(model: PreTrainedModel) -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model))


def _mixes_precisions(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether transformers keeps some tensors of a model in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    return bool(kept) and dtype in (torch.float16, torch.bfloat16)


def write_slices(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model, its weights with the names and shapes that they have in memory, for `unread_model`.

    Args:
        state: the weights, by these names.
    """
    from huggingface_hub import save_torch_state_dict

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict(dict(state), folder, metadata=dict(_AS_IN_MEMORY))


def _is_as_in_memory(source: Source) -> bool:
    from safetensors import safe_open

    files = [path for path in weight_files(source) if path.suffix == ".safetensors"]
    if not files:
        return False
    with safe_open(files[0], "pt") as file:
        return (file.metadata() or {}).get("tensors") == _AS_IN_MEMORY["tensors"]


def _places(source: Source, model: PreTrainedModel) -> dict[str, _Stored] | None:
    """Where each weight of a model is stored, by its name in the model; None where one is not, or in another shape."""
    shapes, stored = {}, {}
    for path in weight_files(source):
        if path.suffix == ".safetensors":
            for name, entry in safetensors_header(path).items():
                shapes[name], stored[name] = tuple(entry["shape"]), _Stored(path, name)
    prefix = f"{model.base_model_prefix}."
    tied: dict[int, list[str]] = {}
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    found = {}
    for names in tied.values():
        # Files of a decoder alone leave out the name that the model gives it.
        known = {alias for name in names for alias in (name, name.removeprefix(prefix)) if alias in stored}
        # Of tied weights that are stored twice transformers compares the two.
        if len(known) != 1 or shapes[alias := known.pop()] != tuple(tensors[names[0]].shape):
            return None
        found |= dict.fromkeys(names, stored[alias])
    return found


def read_parts(model: nn.Module, device: torch.device) -> None:
    """Fill what is still in files: of sharded weights this rank's part, the others whole. Tied weights stay tied."""
    read: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for module in model.modules():
        for name, stored in _UNREAD.pop(module, {}).items():
            tensor: Tensor = getattr(module, name)
            if not isinstance(tensor, nn.Parameter):
                tensor.copy_(_read(stored, lambda whole: whole[...], tensor, tensor.device))
                continue
            if id(tensor) not in read:
                # The old one is kept, so that no other gets its id.
                read[id(tensor)] = tensor, nn.Parameter(_part(stored, tensor, device), requires_grad=False)
                read[id(tensor)][1].requires_grad_(tensor.requires_grad)
            setattr(module, name, read[id(tensor)][1])


def _part(stored: _Stored, weight: Tensor, device: torch.device) -> Tensor:
    """This rank's part of a weight that is sharded along its first dimension; the whole of another one."""
    from limbeck.models.whole import is_sharded

    if not is_sharded(weight):
        return _read(stored, lambda whole: whole[...], weight, device)
    from torch.distributed.tensor import DTensor, Shard

    sharded: DTensor = weight  # type: ignore[assignment]
    assert tuple(sharded.placements) == (Shard(0),), "fully_shard's own, on a mesh of one dimension"
    mesh, local, rows = sharded.device_mesh, sharded.to_local(), sharded.shape[0]
    # As torch.chunk cuts: all parts are of one size but for the last ones.
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    last = first + (local.shape[0] if local.numel() else 0)
    part = _read(stored, lambda whole: whole[first:last], local, device) if last > first else _empty(local, device)
    part = RowsOnGrid.of(part) if isinstance(local, RowsOnGrid) else part
    return DTensor.from_local(
        part, mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


def _empty(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)


def _read(stored: _Stored, cut: Callable[[Any], Tensor], like: Tensor, device: torch.device) -> Tensor:
    """What is cut out of a stored tensor, in memory of its own and the precision of another one."""
    from safetensors import safe_open

    # Opened anew for each tensor: pages of a file that was read stay with the process for as long as it is open.
    with safe_open(stored.path, framework="pt") as file:
        return _empty(like, device).copy_(cut(file.get_slice(stored.name)))


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Let a model that is unread pass for one on the CPU inside the block, each weight one number that is seen often.

    It is no number (NaN), so that nothing computes with it unseen.
    """
    unread: list[tuple[nn.Module, Mapping[str, nn.Parameter]]] = []
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        own = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.is_meta}
        unread.append((module, own))
        for name, weight in own.items():
            seen = torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape)
            setattr(module, name, made.setdefault(id(weight), nn.Parameter(seen, requires_grad=weight.requires_grad)))
    try:
        yield
    finally:
        for module, own in unread:
            for name, weight in own.items():
                weight.requires_grad_(getattr(module, name).requires_grad)
                setattr(module, name, weight)
