"""A teacher sharded over the ranks of a launch: each keeps its part of every block, and all pass through it together.

A pass gathers one block after another on all ranks, so that none can pass alone. Before each pass the ranks meet: those
that have something to score pass with it, and one that has nothing attends with a single token, until none has. So
ranks may have any number of batches of any size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from limbeck.fields import STRICT
from limbeck.runtime.launcher import launched
from limbeck.teachers.base import Provision, TeacherModel
from limbeck.teachers.in_process import InProcessTeacher
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from limbeck.models.assets import DownloadProgress
    from limbeck.models.loading import LoadedModel

# As long as NCCL waits for an exchange.
PATIENCE_S = 600.0


@dataclass(config=STRICT, kw_only=True)
class Sharded:
    """The model runs in all processes of a launch, each of which keeps its part of every block.

    It says what the whole model says, and writes nothing. One process has all of it.
    """

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> ShardedTeacher:
        """Open the teacher; nothing is loaded yet."""
        return ShardedTeacher(model=model, device=device, progress=progress)


@dataclasses.dataclass(kw_only=True)
class ShardedTeacher(InProcessTeacher):
    """A teacher of which each rank has its part: what it says is known, and no rank has the whole model."""

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"hidden"})

    def weights(self) -> LoadedModel:
        raise self.lacks("weights")

    @property
    def in_step(self) -> bool:
        return launched().ranks > 1

    def attend(self) -> None:
        """Pass with the other ranks until none has anything to score.

        Raises:
            LimbeckError: one of them does not come; names it.
        """
        import torch

        from limbeck.models.heads import decoder_of

        if not self.in_step:
            return
        model = self._scorer().model
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)

        def passing() -> None:
            with torch.inference_mode():
                decoder_of(model)(input_ids=token, use_cache=False)

        self._meeting.attend(passing)

    @cached_property
    def _meeting(self) -> _Meeting:
        return _Meeting(self.device)

    def _load(self) -> LoadedModel:
        if not self.in_step:
            return super()._load()
        loaded = self._read(unread=True)
        _shard(loaded.model, self._meeting)
        return loaded


class _Meeting:
    """Where the ranks meet before each pass, and the mesh that they share the weights over."""

    def __init__(self, device: torch.device):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        limit = timedelta(seconds=PATIENCE_S)
        if not dist.is_initialized():
            dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=limit)
        self.device = device
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        # Between hosts, whatever the devices exchange by.
        self._group: Any = dist.new_group(backend="gloo", timeout=limit)
        self._attending = False

    def begin(self) -> None:
        """Called before each pass."""
        if not self._attending:
            self._meet(True)

    def attend(self, passing: Callable[[], None]) -> None:
        """Pass by `passing` as long as any rank has something to score."""
        while self._meet(False):
            self._attending = True
            try:
                passing()
            finally:
                self._attending = False

    def _meet(self, wants: bool) -> bool:
        """Whether any rank has something to score, once all have come.

        Raises:
            LimbeckError: one has not; names it.
        """
        import torch
        import torch.distributed as dist

        found = torch.tensor([int(wants)])
        try:
            dist.monitored_barrier(self._group, timedelta(seconds=PATIENCE_S), wait_all_ranks=True)
            dist.all_reduce(found, group=self._group)
        except RuntimeError as error:
            late = re.search(r"Ranks? ([\d, ]+) failed", str(error))
            whom = f"rank {late[1].strip(' ,')}" if late else "rank 0" if dist.get_rank() else "another rank"
            raise LimbeckError(
                f"rank {dist.get_rank()} has waited for {whom} before a pass of the sharded teacher, which all ranks "
                f"make together (for {PATIENCE_S:.0f} s, or until that one ended); look at what it said, and start the "
                "same command again: nothing finished is lost"
            ) from None
        return bool(found)


def _shard(model: PreTrainedModel, meeting: _Meeting) -> None:
    """Shard the blocks of a model over the ranks, in place; what lies outside of them, the head too, stays whole."""
    from torch.distributed.fsdp import fully_shard

    from limbeck.models.heads import decoder_blocks, decoder_of
    from limbeck.models.slices import read_parts

    _, blocks = decoder_blocks(model)
    model.requires_grad_(False)
    inside = {id(weight) for weight in blocks.parameters()}
    outside = {weight for weight in model.parameters() if id(weight) not in inside}
    for weight in outside:
        # What is still in its file is read to where it belongs.
        if not weight.is_meta:
            weight.data = weight.data.to(meeting.device)
    for block in blocks:
        fully_shard(block, mesh=meeting.mesh, reshard_after_forward=True)
    # Of its own it has nothing to gather: it gathers a block while the one before computes.
    fully_shard(decoder_of(model), mesh=meeting.mesh, reshard_after_forward=True, ignored_params=outside)
    read_parts(model, meeting.device)
    blocks[0].register_forward_pre_hook(lambda block, inputs: meeting.begin(), prepend=True)
