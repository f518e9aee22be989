"""A model that is sharded over the ranks of a launch, and the whole one: what has to see every weight reads a copy.

The copy has the model's structure and no weights until it is filled, one weight after another, by all ranks together.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from limbeck.models.quantization.on_grid import OnGrid
from limbeck.runtime.files import naming
from limbeck.runtime.folders import remove

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_COPIES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has a part of a tensor alone."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without its gradient. Where it is sharded, all ranks call."""
    if not is_sharded(tensor):
        return tensor.detach()
    part: DTensor = tensor.detach()  # type: ignore[assignment]
    return part.full_tensor()


def keep_copy(model: nn.Module, device: torch.device) -> None:
    """Make the copy that `whole` fills, before the model is sharded: everything of it but its weights.

    What the model has beside its weights (grids, angles of positions) the two share.
    """
    empty = {
        id(weight): nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)
        for _, weight in model.named_parameters()
    }
    beside = {id(buffer): buffer for buffer in model.buffers()}
    _COPIES[model] = copy.deepcopy(model, empty | beside).eval()  # type: ignore[arg-type]


def reader_copy(model: nn.Module) -> nn.Module:
    """The module that reads the whole weights: the model itself, or the copy of one that is sharded.

    A copy has weights inside `whole` and `whole_on_first_rank` alone, and is the same object each time.
    """
    return _COPIES.get(model, model)


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its whole weights on every rank, as they are now. Where it is sharded, all enter together."""
    with _copy_of(model) as places:
        for name, weight in model.named_parameters() if places else ():
            places[name].data = whole_tensor(weight)
        yield reader_copy(model)


@contextmanager
def whole_on_first_rank(model: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """The model with its whole weights on the first rank alone, which need not have the memory for them.

    Where it is sharded, all ranks enter together, and the others get the copy without weights.

    Args:
        folder: where the weights lie in files that are mapped into memory, until the end.

    Raises:
        OSError: the disk has no room for them.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    try:
        with _copy_of(model) as places:
            for number, (name, weight) in enumerate(model.named_parameters() if places else ()):
                file = _mapped(weight, folder / f"{number:06d}") if first else None
                _gather(weight.detach(), file)
                if file is not None:
                    places[name].data = file
            yield reader_copy(model)
    finally:
        if first:
            remove(folder)


@contextmanager
def _copy_of(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of a sharded model's copy by their names, which lose their weights at the end; of another none."""
    places = dict(_COPIES[model].named_parameters()) if model in _COPIES else {}
    try:
        yield places
    finally:
        for place in places.values():
            place.data = place.new_empty(0)
        for module in _COPIES[model].modules() if places else ():
            if isinstance(module, OnGrid):
                module.forget()


def _mapped(like: Tensor, file: Path) -> Tensor:
    """A tensor of this shape in a file: the system takes its memory back where it wants it for something else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # A disk that turns out to be full while mapped memory is written would end the process without a word.
    with naming(file), file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, like.numel() * like.element_size())
    return torch.from_file(str(file), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


def _gather(tensor: Tensor, target: Tensor | None) -> None:
    """Fill the first rank's target with a whole tensor: each part is sent to where it belongs, and to no other rank."""
    if not is_sharded(tensor):
        if target is not None:
            target.copy_(tensor)
        return
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    assert tensor.placements == (Shard(0),), "sharded by rows, over all ranks"
    part = tensor.to_local().contiguous()
    if target is None:
        if part.numel():
            torch.distributed.send(part, 0)
        return
    # A tensor of fewer rows than ranks has fewer pieces.
    for rank, piece in enumerate(target.chunk(torch.distributed.get_world_size())):
        if rank == 0:
            piece.copy_(part)
            continue
        arrived = piece if part.is_cpu else torch.empty_like(piece, device=part.device)
        torch.distributed.recv(arrived, rank)
        if arrived is not piece:
            piece.copy_(arrived)
