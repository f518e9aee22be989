"""The teacher's signal on disk: written once, read by the ids of responses.

    signal/  head.safetensors  head.json  00000.safetensors  00001.safetensors ...

A shard belongs to one batch of responses. Of each response it holds, under its `Response.id`, hidden states (N*D
numbers instead of N*V) as `9f86d081884c7d65`, or a sparse signal (N*K numbers) as `9f86d081884c7d65.ids` and so on. A
shard that exists is whole, so an interrupted pass continues with the next one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.runtime.files import whole_file, write_json
from limbeck.runtime.records import read_fields
from limbeck.types import DenseSignal, Head, LimbeckError, SampledSignal, Signal, TokenBatch, TopKSignal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The tensors of a sparse signal: field, name on disk. Draws come from the teacher, so their proposal is its own.
_COLUMNS = {"ids_NK": "ids", "logp_NK": "logp", "log_z_NG": "log_z", "count_NK": "count"}


def write_shard(path: Path, hidden: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Write the (tokens, D) hidden states of some responses, by their ids, atomically.

    Raises:
        LimbeckError: a hidden state that is not finite, or not in the precision it is stored in.
    """
    write_signal(path, dense_rows(hidden, dtype=dtype))


def dense_rows(hidden: Mapping[str, Tensor], *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of hidden states as they are stored; see `write_shard`."""
    stored = {name: hidden_TD.detach().to("cpu", dtype).contiguous() for name, hidden_TD in hidden.items()}
    for name, stored_TD in stored.items():
        if not hidden[name].isfinite().all():
            raise LimbeckError(f"the teacher's output is not finite on response {name}; try teacher.dtype=float32")
        if not stored_TD.isfinite().all():
            raise LimbeckError(
                f"hidden states of response {name} overflow {dtype}; set teacher.cache_dtype=float32 or bfloat16"
            )
    return stored


def sparse_rows(signals: Mapping[str, TopKSignal | SampledSignal]) -> dict[str, Tensor]:
    """The tensors of sparse signals as they are stored: 32 bits per number.

    Raises:
        LimbeckError: a log-probability that is not a number.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for response, signal in signals.items():
        if signal.logp_NK.isnan().any():
            raise LimbeckError(f"the teacher's output is not finite on response {response}; try teacher.dtype=float32")
        for name, short in _COLUMNS.items():
            column: Tensor | None = getattr(signal, name, None)
            if column is not None:
                dtype = torch.float32 if column.is_floating_point() else torch.int32
                tensors[f"{response}.{short}"] = column.detach().to("cpu", dtype).contiguous()
    return tensors


def write_signal(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard of `dense_rows` and `sparse_rows`, atomically."""
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        save_file(dict(tensors), partial)


def write_head(folder: Path, head: Head) -> None:
    """Write the teacher's head beside its hidden states, so that training needs nothing else of the teacher."""
    from safetensors.torch import save_file

    tensors = {"weight": head.weight_VD.detach()[: head.vocab_size].contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach()[: head.vocab_size].contiguous()
    with whole_file(folder / "head.safetensors") as partial:
        save_file(tensors, partial)
    write_json(folder / "head.json", {"scale": head.scale, "softcap": head.softcap, "vocab_size": head.vocab_size})


def read_head(folder: Path) -> Head:
    """The head that `write_head` wrote.

    Raises:
        LimbeckError: the files hold something else.
    """
    from safetensors.torch import load_file

    tensors = load_file(folder / "head.safetensors")
    kinds = {"scale": (int, float), "softcap": (int, float, type(None)), "vocab_size": int}
    scalars: dict[str, Any] = read_fields(folder / "head.json", kinds)
    if tensors.keys() - {"bias"} != {"weight"} or len(tensors["weight"]) != scalars["vocab_size"]:
        raise _damaged(folder / "head.safetensors", f"it holds {', '.join(tensors) or 'nothing'}")
    return Head(weight_VD=tensors["weight"], bias_V=tensors.get("bias"), **scalars)


_ENTRY = re.compile(rf"([0-9a-f]{{16}})(?:\.(?:{'|'.join(_COLUMNS.values())}))?")


def _damaged(path: Path, what: str) -> LimbeckError:
    return LimbeckError(f"{path} is damaged ({what}); delete it and run the same command again")


def shards_of(folder: Path) -> dict[str, Path]:
    """The shard of every response in a folder, by its id.

    Raises:
        LimbeckError: a shard holds something else.
    """
    from safetensors import safe_open

    shards: dict[str, Path] = {}
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
        entries = [_ENTRY.fullmatch(name) for name in names]
        if not all(entries):
            raise _damaged(path, f"it holds {names[entries.index(None)]}")
        shards |= {entry[1]: path for entry in entries if entry}
    return shards


@dataclass(frozen=True)
class OpenShards:
    """Shards that are opened when they are first read and stay open."""

    _open: dict[Path, Any] = field(default_factory=dict)

    def entry(self, path: Path, name: str) -> dict[str, Tensor]:
        """The tensors of a response by their short names; `hidden` alone where hidden states are stored."""
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        shard = self._open[path]
        stored = set(shard.keys())
        if name in stored:
            return {"hidden": shard.get_tensor(name)}
        shorts = [short for short in _COLUMNS.values() if f"{name}.{short}" in stored]
        return {short: shard.get_tensor(f"{name}.{short}") for short in shorts}

    def close(self, path: Path) -> None:
        """Close a shard, where it was read."""
        if path in self._open:
            self._open.pop(path).__exit__(None, None, None)


@dataclass(frozen=True)
class StoredTeacher:
    """A `Teacher` that reads what an earlier pass wrote.

    Attributes:
        shards: the shard of every response on disk, by its id.
        temperatures: the grid that sparse signals were made for.
    """

    folder: Path
    head: Head
    shards: Mapping[str, Path]
    device: torch.device
    temperatures: tuple[float, ...] = ()
    _open: OpenShards = field(default_factory=OpenShards)

    @classmethod
    def open(cls, folder: Path, *, device: torch.device, temperatures: tuple[float, ...] = ()) -> StoredTeacher:
        from dataclasses import replace

        head = read_head(folder)
        bias_V = None if head.bias_V is None else head.bias_V.to(device)
        return cls(
            folder=folder,
            head=replace(head, weight_VD=head.weight_VD.to(device), bias_V=bias_V),
            shards=shards_of(folder),
            device=device,
            temperatures=temperatures,
        )

    def signal(self, batch: TokenBatch) -> Signal:
        """The stored signal at every loss position of the batch: of the kind it was stored as."""
        import torch

        rows = [self._entry(name) for name in batch.ids]
        require_lengths(self.folder, rows, batch)
        joined = {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}
        if "ids" not in joined:
            return DenseSignal(hidden_ND=joined["hidden"].to(self.head.weight_VD.dtype), head=self.head)
        columns = {name: joined[short] for name, short in _COLUMNS.items() if short in joined}
        columns["ids_NK"] = columns["ids_NK"].long()
        if "count" not in joined:
            return TopKSignal(**columns, temperatures=self.temperatures)
        return SampledSignal(**columns, log_proposal_NK=columns["logp_NK"], temperatures=self.temperatures)

    def _entry(self, name: str) -> dict[str, Tensor]:
        """The tensors of a response by their short names."""
        path = self.shards.get(name)
        if path is None:
            raise LimbeckError(
                f"{self.folder} has no signal for response {name}; delete it and run the same command again"
            )
        return self._open.entry(path, name)


def require_lengths(where: Path, entries: Sequence[Mapping[str, Tensor]], batch: TokenBatch) -> None:
    """Refuse signals that are stored under the ids of a batch but belong to other tokens.

    Raises:
        LimbeckError: an entry has another number of tokens than its response.
    """
    found, expected = [len(next(iter(entry.values()))) for entry in entries], batch.loss_mask_BT.sum(1).tolist()
    if found != expected:
        raise LimbeckError(
            f"{where} holds signals of {found} tokens for responses of {expected} tokens; "
            "it was made from other responses: delete it and run the same command again"
        )
