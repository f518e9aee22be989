"""The teacher of an on-policy training: signals of responses on disk are read, those of new ones computed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from limbeck.pipeline.capturing import (
    SCORING_BATCH_SIZE,
    addresses_as_read,
    at_temperatures,
    batches_of,
    signals_of,
    write_signals,
)
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stages.teach import stored_signals
from limbeck.pipeline.store_identity import exact_codec, frame_of
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.runtime.columns import ROWS
from limbeck.teachers.base import Teacher
from limbeck.teachers.chosen import StudentsChoice
from limbeck.teachers.store.addresses import addresses_of
from limbeck.teachers.store.base import Codec, Frame
from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.shards import Columns, OpenShards
from limbeck.teachers.store.source import on_device
from limbeck.types import DenseSignal, Response, Signal, TokenBatch, TopKSignal


@dataclass(frozen=True, kw_only=True)
class CachedTeacher:
    """Scores new responses, and reads the signals of responses on disk (`rollouts.rounds.SignalCache`).

    Attributes:
        codec, frame: of the signals on disk.
        before: those that were stored before training, of which some were looked up.
        places: shard and number of the others, by the addresses of what the teacher read.
    """

    teacher: Teacher
    codec: Codec
    frame: Frame
    before: Store | None = None
    places: dict[bytes, tuple[Path, int]] = field(default_factory=dict)
    _shards: OpenShards = field(default_factory=OpenShards)

    def signal(self, batch: TokenBatch) -> Signal:
        """The teacher's distribution at every loss position of the batch.

        A batch with a single new response is scored whole: that depends on what is on disk when its step begins, which
        is the same in a run that was interrupted.
        """
        stored = self.read_stored(batch)
        if stored is not None:
            return on_device(stored, self.teacher.head.weight_VD.device)
        signal = self.teacher.signal(batch)
        return at_temperatures(signal, self.frame.temperatures) if isinstance(signal, TopKSignal) else signal

    def read_stored(self, batch: TokenBatch) -> Signal | None:
        rows = self.stored(addresses_of(self.teacher.reads(batch)))
        return None if rows is None else self.decoded(rows)

    def stored(self, addresses: Sequence[bytes]) -> list[Columns] | None:
        """The stored columns of some addresses; None where one has none."""
        rows = []
        for address in addresses:
            if (entry := self._entry(address)) is None:
                return None
            rows.append(entry)
        return rows

    def decoded(self, rows: Sequence[Columns]) -> Signal:
        """The signal of the columns of some responses, on the host."""
        joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return self.codec.decode(joined, self.frame, self.teacher.head)

    def _entry(self, address: bytes) -> Columns | None:
        """The stored columns of an address; None where there are none."""
        if self.before is not None and address in self.before.places:
            return self.before.entry(address)[1]
        if address not in self.places:
            return None
        path, number = self.places[address]
        return self._shards[path].entry(number)

    def start_round(self, folder: Path) -> None:
        """Delete the signals of the rounds before the one in `folder`, which no step reads again."""

        def earlier(shard: Path) -> bool:
            inside = shard.is_relative_to(folder.parent)
            return inside and int(shard.relative_to(folder.parent).parts[0]) < int(folder.name)

        self.forget({shard for shard, _ in self.places.values() if earlier(shard)})
        for shard in filter(earlier, folder.parent.glob("*/*/*.safetensors")):
            # Until now a batch with a new response beside old ones was scored whole.
            self.teacher.settled(_batches_of(shard.with_suffix(".jsonl")))
            # Another process may have been here first.
            shard.unlink(missing_ok=True)

    def forget(self, shards: Collection[Path]) -> None:
        """Read these files no more."""
        for address in [address for address, (shard, _) in self.places.items() if shard in shards]:
            del self.places[address]
        for shard in shards:
            self._shards.close(shard)

    def store(self, path: Path, responses: Sequence[Response], hidden: Sequence[Tensor] | None) -> None:
        """Write the signals of some responses beside them; compute those that sampling has not."""
        signals: list[Signal] = []
        choosing = self.teacher if isinstance(self.teacher, StudentsChoice) else None
        if hidden is not None:
            signals = [DenseSignal(hidden_ND=hidden_TD, head=self.teacher.head) for hidden_TD in hidden]
            if choosing is not None:
                alone = (collate([response], [0], pad_id=0) for response in responses)
                signals = [choosing.kept(one, choosing.asks(batch)) for one, batch in zip(signals, alone, strict=True)]
        else:
            if choosing is not None:
                choosing.fetch_ahead(batches_of(responses), lambda tokens: None)
            for start in range(0, len(responses), SCORING_BATCH_SIZE):
                signals += signals_of(self.teacher, responses[start : start + SCORING_BATCH_SIZE])
        addresses = addresses_as_read(responses, self.teacher.reads)
        write_signals(path.with_suffix(".safetensors"), addresses, responses, signals, self.codec, self.frame)
        if choosing is not None:
            # The student moves on: what it chose cannot be found again.
            choosing.settled(batches_of(responses))

    def register(self, path: Path) -> None:
        """Note that the signals of a file of responses are beside it, unless a run that went further deleted them."""
        shard = path.with_suffix(".safetensors")
        if not shard.exists():
            return
        found = self._shards[shard].addresses
        self.places.update({address: (shard, number) for number, address in enumerate(found)})


def _batches_of(path: Path) -> Iterator[TokenBatch]:
    """The responses of a file of a round."""
    yield from batches_of(read_responses(path) if path.exists() else ())


def round_teacher(context: RunContext, base: Iterable[Response], asked: Teacher) -> CachedTeacher:
    """The teacher, with the signals that were stored before training.

    Args:
        base: training responses that were there before.
        asked: the teacher that the training asks.
    """
    before = None
    if context.recipe.teacher.cache:
        signals, left = stored_signals(context), iter(base)
        before = signals.store
        # Few of them are in memory at a time.
        while some := list(islice(left, ROWS)):
            before.locate(addresses_as_read(some, signals.reads))
    return CachedTeacher(teacher=asked, codec=exact_codec(context.recipe), frame=frame_of(context), before=before)
