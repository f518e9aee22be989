"""Hidden states of vLLM without a GPU: its own connector copies them on CUDA streams, this one does not.

    PYTHONPATH=examples python -m vllm.entrypoints.openai.api_server ... --kv-transfer-config \
      '{"kv_connector": "CpuHiddenStatesConnector", "kv_connector_module_path": "vllm_cpu_hidden_states",
        "kv_role": "kv_producer", "kv_connector_extra_config": {"shared_storage_path": "/dev/shm/states"}}'

It runs inside vLLM's environment, which need not have limbeck; made for vLLM 0.32.0. See docs/serving.md.
"""

# pyright: reportMissingImports=false

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class _Done:
    """The event of a copy that was made on the spot."""

    def query(self) -> bool:
        return True


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """The same files, written before the answer is sent. The lock beside a file is given back once it is whole."""

    def _submit_async_write(self, pending: Any) -> None:
        lock = self._lock_fds.pop(pending.req_id, None)
        try:
            blocks = torch.tensor(pending.block_ids, dtype=torch.long)
            slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
            states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
            tensors = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
            os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
            save_file(tensors, pending.filename)
        finally:
            if lock is not None:
                os.close(lock)
        self._req_copy_events[pending.req_id] = _Done()
