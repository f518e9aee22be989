"""A teacher in this process that one device cannot hold: its blocks are spread over devices, memory and disk."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from pydantic.dataclasses import dataclass

from limbeck.fields import NEUTRAL, STRICT
from limbeck.teachers.base import Provision, TeacherModel
from limbeck.teachers.in_process import InProcessTeacher
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress
    from limbeck.models.loading import LoadedModel


@dataclass(config=STRICT, kw_only=True)
class Placed:
    """The model runs in this process, block by block over its devices; blocks without room wait in memory or on disk.

    It says what the whole model says, and writes what that writes; no student is cut out of it.
    """

    memory: Annotated[dict[str, str], NEUTRAL] = dataclasses.field(default_factory=dict)
    """The most that it takes on each device, such as {"cuda:0": 70GiB, cpu: 200GiB}, and nothing on the others; empty
    takes what is free, but for what a pass needs. What has no room is read from its files in every pass."""

    def most(self, device: str) -> int | None:
        """Bytes that it takes at most on a device; None where that is what is free.

        Raises:
            LimbeckError: an amount that is none.
        """
        from limbeck.models.placing import bytes_of

        return bytes_of(device, self.memory.get(device, "0")) if self.memory else None

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> PlacedTeacher:
        """Open the teacher; nothing is loaded yet."""
        return PlacedTeacher(model=model, device=device, progress=progress, where=self)


@dataclasses.dataclass(kw_only=True)
class PlacedTeacher(InProcessTeacher):
    """A teacher whose blocks are spread over devices: it says and writes all, and no whole model is in memory."""

    where: Placed

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"hidden", "writing"})

    def weights(self) -> LoadedModel:
        raise self.lacks("weights")

    def writing(self) -> LoadedModel:
        return self._model()

    def reach(self) -> None:
        """Check that each part of it has a place, without its weights.

        Raises:
            LimbeckError: it has none, or its file cannot be read in parts.
        """
        _ = self._device_map

    @property
    def _device_map(self) -> dict[str, int | str]:
        from limbeck.models.loading import as_dtype
        from limbeck.models.placing import device_map, room

        if self._source().gguf is not None:
            raise LimbeckError(
                f"teacher.where=placed reads a model block by block and {self.model.model} is a GGUF file, which is "
                "unpacked whole; name a folder with safetensors files, or set teacher.where=in_process"
            )
        itemsize = as_dtype(self.model.dtype).itemsize
        places = room(self.where.memory, self.device)
        return device_map(self.skeleton, places, itemsize, all_free=not self.where.memory)

    def _load(self) -> LoadedModel:
        return self._read(device_map=self._device_map)
