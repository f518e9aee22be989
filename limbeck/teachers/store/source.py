"""The signals in a store as a source for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from limbeck.teachers.store.addresses import addresses_of
from limbeck.teachers.store.reader import Store, codec_name
from limbeck.types import Head, Signal, TokenBatch

if TYPE_CHECKING:
    import torch


def as_it_is(batch: TokenBatch) -> TokenBatch:
    """The batch of a teacher that reads what the student does."""
    return batch


@dataclass
class StoredSignals:
    """A `SignalSource` that reads a store.

    Attributes:
        device: of the signals that it gives.
        reads: a batch as the teacher read it; its hash is the address.
    """

    store: Store
    device: torch.device
    reads: Callable[[TokenBatch], TokenBatch] = as_it_is

    @cached_property
    def heads(self) -> dict[str, Head]:
        """The heads of hidden states by the name of their codec; none for a store of sparse signals alone."""
        found = {codec_name(codec): self.store.head(codec, self.device) for codec in self.store.manifest.codecs}
        return {name: head for name, head in found.items() if head is not None}

    def signal(self, batch: TokenBatch) -> Signal:
        """The stored signal at every loss position of the batch.

        Raises:
            LimbeckError: the store has none for a row, or a damaged one.
        """
        return on_device(self.read_stored(batch), self.device)

    def read_stored(self, batch: TokenBatch) -> Signal:
        return self.store.signal(self.reads(batch), self.heads)

    def locate(self, batches: Iterable[TokenBatch]) -> None:
        """Look up the rows of some batches, all in one pass.

        Raises:
            LimbeckError: the store lacks one.
        """
        addresses = [address for batch in batches for address in addresses_of(self.reads(batch))]
        self.store.locate(addresses)
        missing = sum(address not in self.store.places for address in addresses)
        if missing:
            raise self.store.lacks(missing, len(addresses))


def on_device(signal: Signal, device: torch.device) -> Signal:
    """A signal with its tensors on a device; the head stays where it is."""
    from limbeck.ops.records import with_tensors

    return with_tensors(signal, lambda tensor: tensor.to(device))
