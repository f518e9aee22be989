"""Micro-batches on the training device. For a CUDA device the next one is prepared while the student computes this one.

Preparing takes no model: rows become tensors, and a signal that is on disk is read, in a thread, into memory that the
device copies from without the host waiting for it. What a teacher must compute is computed where it is wanted. The
thread works while the student computes and at no other time, so that sources and teachers are used by one thread at a
time; it holds one micro-batch, on the host. On a CPU it gained nothing (docs/results/data-plane.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from limbeck.ops.records import Record, with_tensors
from limbeck.rollouts.collate import collate
from limbeck.training.background import Background
from limbeck.types import Response, Signal, SignalSource, StoredSource, TokenBatch

# Step and number of a micro-batch.
Place = tuple[int, int]
Pin = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """A micro-batch on the host.

    Attributes:
        signal: None where the teacher must compute it.
    """

    batch: TokenBatch
    signal: Signal | None


Read = Callable[[], HostBatch | None]


def pin_of(device: torch.device) -> Pin | None:
    """What copies a tensor into memory that a device copies from by itself; None for a device that has no such."""
    return partial(_pinned, device=device) if device.type == "cuda" else None


def _pinned(tensor: Tensor, *, device: torch.device) -> Tensor:
    try:
        # A thread begins on the first device, where this would take some hundred MiB on each rank.
        with torch.cuda.device(device):
            return tensor.pin_memory()
    except RuntimeError:
        # The system gives none, or no more of it: the copy then waits, and is the same.
        return tensor


@dataclass(kw_only=True)
class MicroBatches:
    """Makes the micro-batches of a training.

    Attributes:
        pin: see `pin_of`; None prepares nothing ahead.
    """

    teacher: SignalSource
    device: torch.device
    pad_id: int
    pin: Pin | None
    _ahead: tuple[Place, HostBatch | BaseException | None] | None = field(default=None, init=False)

    @classmethod
    def of(cls, teacher: SignalSource, device: torch.device, pad_id: int) -> MicroBatches:
        return cls(teacher=teacher, device=device, pad_id=pad_id, pin=pin_of(device))

    def read(self, by_row: Mapping[int, Response], rows: tuple[int, ...]) -> HostBatch:
        """Some rows as tensors, with their signal where that is on disk.

        Without rows, one row whose loss does not count: all ranks meet at each pass.
        """
        batch = collate(by_row, rows or tuple(by_row)[-1:], pad_id=self.pad_id)
        return HostBatch(
            batch=batch,
            signal=self.teacher.read_stored(batch) if isinstance(self.teacher, StoredSource) else None,
        )

    def on_device(self, read: Read, place: Place | None = None) -> tuple[TokenBatch, Signal]:
        """A micro-batch and its signal on the device: as it was prepared for its place, else read now.

        Raises:
            Exception: what went wrong where it was prepared.
        """
        ahead, self._ahead = self._ahead, None
        found = ahead[1] if ahead is not None and ahead[0] == place else None
        if isinstance(found, BaseException):
            raise found
        found = found or read()
        assert found is not None, "only what is read ahead may be unknown"
        signal = self.teacher.signal(found.batch) if found.signal is None else self._moved(found.signal)
        return self._moved(found.batch), signal

    @contextmanager
    def preparing(self, place: Place, read: Read | None) -> Iterator[None]:
        """A block in which the student computes while the micro-batch of another place is read.

        Args:
            read: reads it, or gives None where it is not known yet; None prepares none.
        """
        pin = self.pin
        if pin is None or read is None:
            yield
            return
        with Background() as beside:
            beside.begin(lambda _: self._prepare(place, read, pin), reads_weights=False)
            yield

    def _prepare(self, place: Place, read: Read, pin: Pin) -> None:
        try:
            found = read()
            if found is not None:
                signal = None if found.signal is None else with_tensors(found.signal, pin)
                found = HostBatch(batch=with_tensors(found.batch, pin), signal=signal)
        except BaseException as error:
            # Raised in the step that wants it, if one does.
            found = error
        self._ahead = (place, found)

    def _moved(self, record: Record) -> Record:
        return with_tensors(record, lambda tensor: tensor.to(self.device, non_blocking=self.pin is not None))
