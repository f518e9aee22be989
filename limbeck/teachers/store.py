"""The teacher's hidden states on disk: written once, read by row, N*D numbers instead of N*V.

    signal/  head.safetensors  head.json  00000.safetensors  00001.safetensors ...

A shard belongs to one batch of responses and holds one tensor a response, named by its row. A shard that exists is
whole, so an interrupted pass continues with the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.flow import DenseSignal, Head, LimbeckError, TokenBatch
from limbeck.rundir import read_json, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def row_name(row: int) -> str:
    """Name of a response's tensor in its shard."""
    return f"row-{row:07d}"


def write_shard(path: Path, hidden: Mapping[int, Tensor], *, dtype: torch.dtype) -> None:
    """Write the (tokens, D) hidden states of some rows, atomically.

    Raises:
        LimbeckError: a hidden state that is not finite, or not in the precision it is stored in.
    """
    from safetensors.torch import save_file

    stored = {row: hidden_TD.detach().to("cpu", dtype).contiguous() for row, hidden_TD in hidden.items()}
    for row, stored_TD in stored.items():
        if not hidden[row].isfinite().all():
            raise LimbeckError(f"the teacher's output is not finite on response {row}; try teacher.dtype=float32")
        if not stored_TD.isfinite().all():
            raise LimbeckError(
                f"hidden states of response {row} overflow {dtype}; set signal.dtype=float32 or bfloat16"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({row_name(row): stored_TD for row, stored_TD in stored.items()}, partial)
    partial.replace(path)


def write_head(folder: Path, head: Head) -> None:
    """Write the teacher's head beside its hidden states, so that training needs nothing else of the teacher."""
    from safetensors.torch import save_file

    tensors = {"weight": head.weight_VD.detach()[: head.vocab_size].contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach()[: head.vocab_size].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".head.safetensors.partial"
    save_file(tensors, partial)
    partial.replace(folder / "head.safetensors")
    write_json(folder / "head.json", {"scale": head.scale, "softcap": head.softcap, "vocab_size": head.vocab_size})


def read_head(folder: Path) -> Head:
    from safetensors.torch import load_file

    tensors = load_file(folder / "head.safetensors")
    scalars: dict[str, Any] = read_json(folder / "head.json")
    return Head(weight_VD=tensors["weight"], bias_V=tensors.get("bias"), **scalars)


@dataclass(frozen=True)
class StoredTeacher:
    """A `Teacher` that reads what an earlier pass wrote.

    Attributes:
        shards: the shard of every row on disk.
        rows: row on disk of each response of the list that batches are made of.
    """

    folder: Path
    head: Head
    shards: Mapping[int, Path]
    rows: Sequence[int]
    device: torch.device
    _open: dict[Path, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, rows: Sequence[int], device: torch.device) -> StoredTeacher:
        from dataclasses import replace

        from safetensors import safe_open

        head = read_head(folder)
        bias_V = None if head.bias_V is None else head.bias_V.to(device)
        shards: dict[int, Path] = {}
        for path in sorted(folder.glob("[0-9]*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                shards |= {int(name.removeprefix("row-")): path for name in shard.keys()}  # noqa: SIM118 (no dict)
        return cls(
            folder=folder,
            head=replace(head, weight_VD=head.weight_VD.to(device), bias_V=bias_V),
            shards=shards,
            rows=rows,
            device=device,
        )

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """The stored distribution at every loss position of the batch."""
        import torch

        rows = [self._row(self.rows[row]) for row in batch.rows]
        found, expected = [len(hidden_TD) for hidden_TD in rows], batch.loss_mask_BT.sum(1).tolist()
        if found != expected:
            raise LimbeckError(
                f"{self.folder} holds {found} hidden states for responses of {expected} tokens; "
                "it was made from other responses: delete it and run `limbeck teach` again"
            )
        hidden_ND = torch.cat(rows).to(self.device, self.head.weight_VD.dtype)
        return DenseSignal(hidden_ND=hidden_ND, head=self.head)

    def _row(self, row: int) -> Tensor:
        from safetensors import safe_open

        path = self.shards.get(row)
        if path is None:
            raise LimbeckError(f"{self.folder} has no hidden states for response {row}; run `limbeck teach` again")
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_tensor(row_name(row))
