"""Checkpoints of a sharded student: each rank writes what it keeps, and reads what it needs.

    step-000050/  shard-00001-model-....safetensors  shard-00002-model-....safetensors  state.json

torch's `distributed.checkpoint` plans and reads them, in safetensors: each file says where its parts of the weights
and moments begin, so that any number of ranks can put them together, one process too. A moment is named by its weight,
as in the files that rank 0 writes of a whole student, which are read in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from limbeck.runtime.hashing import sha256_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PATTERN = "shard-*.safetensors"


def shards_in(folder: Path) -> list[Path]:
    """The files of all ranks; none where rank 0 wrote a whole student."""
    return sorted(folder.glob(_PATTERN))


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    group: ProcessGroup | None = None,
    read: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Write the parts of all ranks into a folder that exists; returns the hash of each file. All ranks call.

    Args:
        group: of the calls between the ranks; None for that of the training.
        read: called when this rank's tensors are written, before their files are read for the hash.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    from limbeck.training.shard_writer import ShardWriter

    save(dict(tensors), storage_writer=ShardWriter(folder), process_group=group)
    read()
    rank = torch.distributed.get_rank()
    own = [path for path in shards_in(folder) if path.name.startswith(f"shard-{rank + 1:05d}-")]
    gathered: list[dict[str, str]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, {path.name: sha256_of(path) for path in own}, group)
    return dict(sorted((name, digest) for files in gathered for name, digest in files.items()))


def shapes_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The whole shape and the precision of each tensor in the files of a folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (one.size, one.properties.dtype) for name, one in found.items()}  # type: ignore[union-attr]


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place from the files of a folder: of sharded ones this rank's part alone is read."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        # Each rank reads for itself, which torch takes for a process without others.
        warnings.simplefilter("ignore")
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def read_whole(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The whole tensors of these names, but for those that no file has."""
    found = shapes_in(folder)
    tensors = {name: torch.empty(found[name][0], dtype=found[name][1]) for name in names if name in found}
    read_shards(folder, tensors)
    return tensors
