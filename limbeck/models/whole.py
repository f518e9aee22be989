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
    """Make the copy that `whole` fills, before the model is sharded: everything of it but its weights."""
    empty = {
        id(weight): nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)
        for _, weight in model.named_parameters()
    }
    _COPIES[model] = copy.deepcopy(model, empty).eval()  # type: ignore[arg-type]


def reader_copy(model: nn.Module) -> nn.Module:
    """The module that reads the whole weights: the model itself, or the copy of one that is sharded.

    A copy has weights inside `whole` alone, and is the same object each time.
    """
    return _COPIES.get(model, model)


@contextmanager
def whole(model: nn.Module, *, here: bool = True, folder: Path | None = None) -> Iterator[nn.Module]:
    """The model with its whole weights, as they are now. Where it is sharded, all ranks enter at the same time.

    Args:
        here: fill this rank's copy too; the others need its parts in any case.
        folder: where the copy's weights lie in files that are mapped into memory, until the end; None puts them into
            memory where the model is.
    """
    if model not in _COPIES:
        yield model
        return
    filled = _COPIES[model]
    places = dict(filled.named_parameters())
    try:
        for number, (name, weight) in enumerate(model.named_parameters()):
            tensor = whole_tensor(weight)
            if here:
                places[name].data = tensor if folder is None else _mapped(tensor, folder / f"{number:06d}")
        yield filled
    finally:
        for place in places.values():
            place.data = place.new_empty(0)
        if folder is not None and here:
            remove(folder)


def _mapped(tensor: Tensor, file: Path) -> Tensor:
    """A copy of a tensor in a file: the system takes its memory back where it wants it for something else.

    Raises:
        OSError: the disk has no room for it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # A disk that turns out to be full while mapped memory is written would end the process without a word.
    with naming(file), file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, tensor.nbytes)
    copied = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return copied.copy_(tensor)
