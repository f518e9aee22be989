"""A model whose blocks are spread over devices; those without room stay in memory or on disk until they compute.

Embeddings, last norm and head are always on the main device, so that ids come in and hidden states come out there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from limbeck.models.heads import decoder_blocks
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Place = int | str
DISK = "disk"
# Of what is free on the main device, where some blocks wait elsewhere: those that come there to compute, two at a time,
# and a share for what they compute.
_PASSING_BLOCKS, _PASSING_SHARE = 2, 0.1


def room(memory: Mapping[str, str], main: torch.device) -> dict[Place, int]:
    """Bytes that a model may take by device, the main one first, then other accelerators, then the host's memory.

    Args:
        memory: by `cuda:0`, `cuda:1`, ... and `cpu`, such as 70GiB; empty takes what is free.

    Raises:
        LimbeckError: an unknown device, or an amount that is none.
    """
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    devices = {("cpu" if place == "cpu" else f"cuda:{place}"): place for place in free}
    found = dict.fromkeys(free, 0) if memory else dict(free)
    for name, amount in memory.items():
        if name not in devices:
            raise LimbeckError(f"teacher.where.memory names {name}, expected one of {', '.join(devices)}")
        found[devices[name]] = bytes_of(name, amount)
    first = _place_of(main)
    return {place: found[place] for place in (first, *(one for one in found if one != first))}


def bytes_of(device: str, amount: str) -> int:
    """The bytes that are written as an amount of memory of a device.

    Raises:
        LimbeckError: it is none.
    """
    from accelerate.utils import convert_file_size_to_int

    try:
        return 0 if amount == "0" else convert_file_size_to_int(amount)
    except ValueError:
        raise LimbeckError(f"teacher.where.memory.{device} is {amount!r}, expected an amount such as 70GiB") from None


def passing_bytes(free: int, block: int) -> int:
    """Bytes of the main device's free memory that are left to blocks which wait elsewhere.

    Args:
        block: bytes of the largest one.
    """
    return _PASSING_BLOCKS * block + int(_PASSING_SHARE * free)


def device_map(
    skeleton: PreTrainedModel, room: Mapping[Place, int], itemsize: int, *, all_free: bool = False
) -> dict[str, Place]:
    """The device of each part of a model: blocks one after another, each on the first device that has room for it.

    Args:
        skeleton: the model without its weights.
        room: bytes by device, the main one first; what fits on none is read from disk when it computes.
        itemsize: bytes of a weight.
        all_free: the room is all that is free, so that blocks which wait elsewhere come to the main device within it.

    Raises:
        LimbeckError: the main device has no room for what lies outside of the blocks.
    """
    _, blocks = decoder_blocks(skeleton)
    sizes = [_bytes(block, itemsize) for block in blocks]
    outside, main = _bytes(skeleton, itemsize) - sum(sizes), next(iter(room))
    found = _in_order(skeleton, room, sizes, outside)
    waiting = {DISK, "cpu"} - {main}
    if all_free and waiting & {*found.values()}:
        less = max(room[main] - passing_bytes(room[main], max(sizes)), outside)
        return _in_order(skeleton, {**room, main: less}, sizes, outside)
    return found


def _in_order(
    skeleton: PreTrainedModel, room: Mapping[Place, int], sizes: Sequence[int], outside: int
) -> dict[str, Place]:
    """The devices of parts whose blocks take so many bytes each, and all else so many."""
    name, _ = decoder_blocks(skeleton)
    main, left = next(iter(room)), dict(room)
    # On the host everything has room: what is on disk is read into it in any case.
    if outside > left[main] and main != "cpu":
        raise LimbeckError(
            f"embeddings, last norm and head take {outside / 2**30:.2f} GiB, and {main} has {left[main] / 2**30:.2f}; "
            "raise teacher.where.memory, or lower teacher.dtype"
        )
    left[main] -= outside
    found = dict.fromkeys(_outside(skeleton, name), main)
    places = [*left, DISK]
    for number, size in enumerate(sizes):
        while places[0] != DISK and left[places[0]] < size:
            places.pop(0)
        found[f"{name}.{number}"] = places[0]
        if places[0] != DISK:
            left[places[0]] -= size
    return found


def _outside(model: nn.Module, blocks: str) -> Iterator[str]:
    """Names of the modules and weights that lie beside the list of blocks and hold neither it nor each other."""
    above = blocks.split(".")
    for depth in range(len(above)):
        prefix = ".".join(above[:depth])
        holder = model.get_submodule(prefix)
        for name, _ in (*holder.named_children(), *holder.named_parameters(recurse=False)):
            if name != above[depth]:
                yield f"{prefix}.{name}" if prefix else name


def _bytes(module: nn.Module, itemsize: int) -> int:
    """Bytes of the weights of a module, tied ones counted once."""
    return sum(weight.numel() for weight in module.parameters()) * itemsize


def _place_of(device: torch.device) -> Place:
    return "cpu" if device.type == "cpu" else (device.index or 0)
