"""A writer for torch's `distributed.checkpoint`: safetensors that go to disk tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class ShardWriter(HuggingFaceStorageWriter):
    """torch's writer, and its format, but for the way to disk: torch's makes one string of bytes of all that a rank
    writes, and holds the rank's part of the weights and moments twice."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        results: list[WriteResult] = []
        for item in plan.items:
            part, name = planner.resolve_data(item), item.index.fqn
            assert isinstance(part, Tensor) and item.tensor_data is not None, "nothing else is in a checkpoint"
            tensors[name] = part.detach().contiguous()
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(index=item.index, size_in_bytes=part.nbytes, storage_data=None))
        if tensors:
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            save_file(tensors, Path(self.path) / name, metadata=metadata)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
