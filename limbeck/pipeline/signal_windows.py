"""Signals of a window of steps: on disk while the training is in it, for corpora whose whole signal would not fit.

    signal-windows/aside/00000.safetensors      of the responses set aside, for all of the training
    signal-windows/0003/00000.safetensors ...   of the window that the training is in

The teacher is in memory while it scores a window, and not beside the training. One behind a server scores the next
window while the training is in this one, each then half as large. Ranks take turns with the files of a window. What was
scored before a kill is read, not scored again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from limbeck.pipeline.cached_teacher import CachedTeacher, round_teacher
from limbeck.pipeline.capturing import SHARD_ROWS, addresses_as_read, batches_of, by_address, signal_for, signals_by_row
from limbeck.pipeline.context import RunContext
from limbeck.rollouts.rounds import ProcessGroup
from limbeck.rollouts.sources import OfflineSource, SourceContext, SourceFactory
from limbeck.rollouts.table import answer_lengths_of
from limbeck.rollouts.windows import Window, WindowedSource
from limbeck.runtime.folders import remove
from limbeck.teachers.base import Teacher
from limbeck.teachers.store.addresses import addresses_of, seed_of
from limbeck.teachers.store.base import bytes_per_token
from limbeck.teachers.store.estimate import INDEX_BYTES, SHARD_HEADER_BYTES
from limbeck.teachers.store.shards import OpenShard
from limbeck.teachers.store.source import on_device
from limbeck.training.background import Background
from limbeck.types import Interrupted, LimbeckError, Response, Signal, TokenBatch

_ASIDE = "aside"


@dataclass(frozen=True, kw_only=True)
class SignalWindows:
    """The folder of windows.

    Attributes:
        cached: reads what is on disk.
        aside: responses on which the training is measured on the way; their signals are kept for all of it.
        limit: bytes at most.
        ahead: where the teacher scores the window that comes next; None where it scores none beside the training.
        should_stop: asked after each file.
        say: called with a line before a window is scored.
    """

    folder: Path
    cached: CachedTeacher
    limit: int
    ahead: Background | None = None
    aside: Sequence[Response] = ()
    should_stop: Callable[[], bool] = lambda: False
    say: Callable[[str], object] = lambda line: None
    _held: list[Path] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        context: RunContext,
        asked: Teacher,
        should_stop: Callable[[], bool],
        *,
        beside: Background | None = None,
        aside: Sequence[Response] = (),
    ) -> SignalWindows:
        """The windows of a training that asks this teacher.

        Args:
            beside: for work beside the training.
        """
        limit = context.recipe.teacher.cache_limit_gib
        assert limit is not None, "asked for where signals are kept in windows"
        return cls(
            folder=context.run.signal_windows,
            cached=round_teacher(context, (), asked),
            limit=int(limit * 2**30),
            ahead=beside if asked.elsewhere else None,
            aside=aside,
            should_stop=should_stop,
            say=context.console.say,
        )

    def source(self, responses: SourceFactory) -> SourceFactory:
        """Responses written before training, whose signals are computed window by window.

        Raises:
            LimbeckError: when the training begins, of a source that writes, or orders in a way of its own.
        """
        per_token = bytes_per_token(self.cached.codec, self.cached.frame)
        # Each file of a window has a header, of which the rows of a full one share the bytes.
        per_row = INDEX_BYTES + -(-SHARD_HEADER_BYTES // SHARD_ROWS)

        def begin(source_context: SourceContext) -> WindowedSource:
            if self.aside:
                self._write(self.folder / _ASIDE, self.aside, source_context.world)

            def opened(window: Window, then: Window | None) -> None:
                self._open(window, then, source_context.world)

            source = responses(source_context)
            if not isinstance(source, OfflineSource):
                raise LimbeckError(
                    f"teacher.cache_limit_gib is for responses that are fixed before training, and the source is a "
                    f"{type(source).__name__}; leave it out"
                )
            bytes_of = answer_lengths_of(source.trained).astype(np.int64) * per_token + per_row
            # The last file of a window is seldom full.
            limit = self.limit // (1 if self.ahead is None else 2) - SHARD_HEADER_BYTES
            return WindowedSource(source, opened, bytes_of=bytes_of, limit=limit)

        return begin

    def signal(self, batch: TokenBatch) -> Signal:
        """The signal of a batch: as it is on disk, or as it would be there."""
        addresses = addresses_of(self.cached.teacher.reads(batch))
        rows = self.cached.stored(addresses)
        if rows is None:
            codec, frame = self.cached.codec, self.cached.frame
            signals = signals_by_row(self.cached.teacher, batch)
            rows = [
                codec.encode(signal_for(codec, frame, signal, seed=seed_of(address)), frame, {})
                for address, signal in zip(addresses, signals, strict=True)
            ]
        return on_device(self.cached.decoded(rows), self.cached.teacher.head.weight_VD.device)

    def read_stored(self, batch: TokenBatch) -> Signal | None:
        return self.cached.read_stored(batch)

    def _open(self, window: Window, then: Window | None, world: ProcessGroup) -> None:
        begun = self.ahead is not None and self.ahead.finish()
        # All ranks have read the last of the window before: they met in its last step.
        self.cached.forget(self._held)
        self._held.clear()
        if world.rank == 0:
            kept = [self._folder(one) for one in (window, then) if one is not None]
            for old in self.folder.glob("[0-9]*"):
                if old not in kept:
                    remove(old)
        world.wait()
        responses = window.responses()
        if world.rank == 0 and not begun:
            self._say(window, responses)
        self._held.extend(self._write(self._folder(window), responses, world))
        if self.ahead is not None and then is not None:
            self._begin(then, self.ahead, world)

    def _begin(self, window: Window, ahead: Background, world: ProcessGroup) -> None:
        """Have the teacher score this rank's part of a window while the training is in the one before."""
        responses = window.responses()
        if world.rank == 0:
            self._say(window, responses, ", while the steps before are trained")
        files = self._files(self._folder(window), responses)

        def score(_: Callable[[], None]) -> None:
            for path, some in self._lacking(files, world):
                # What is left is asked for when the training comes to it; a server that fails is heard of then.
                if ahead.ending or self.should_stop():
                    return
                with suppress(LimbeckError):
                    self._score(path, some)

        ahead.begin(score, reads_weights=False)

    def _say(self, window: Window, responses: Sequence[Response], when: str = "") -> None:
        steps = f"{window.first + 1} to {window.last + 1}"
        self.say(f"teach: the signal of steps {steps}, {len(responses)} responses{when}")

    def _folder(self, window: Window) -> Path:
        return self.folder / f"{window.number:04d}"

    def _files(self, folder: Path, responses: Sequence[Response]) -> dict[Path, Sequence[Response]]:
        """The files of some responses in a folder, and the responses of each."""
        folder.mkdir(parents=True, exist_ok=True)
        every = list(by_address(responses, self.cached.teacher.reads).values())
        return {
            folder / f"{start // SHARD_ROWS:05d}.jsonl": every[start : start + SHARD_ROWS]
            for start in range(0, len(every), SHARD_ROWS)
        }

    def _write(self, folder: Path, responses: Sequence[Response], world: ProcessGroup) -> list[Path]:
        """Score what a folder lacks of some responses; its files, known to the reader."""
        files = self._files(folder, responses)
        for path, some in self._lacking(files, world):
            self._score(path, some)
            if world.ranks == 1 and self.should_stop():
                raise Interrupted("stopped while the teacher scored the responses of the next steps")
        self.cached.teacher.release()
        world.wait()
        for path in files:
            self.cached.register(path)
        return [path.with_suffix(".safetensors") for path in files]

    def _lacking(
        self, files: Mapping[Path, Sequence[Response]], world: ProcessGroup
    ) -> list[tuple[Path, Sequence[Response]]]:
        """The files of this rank's part that are not there."""
        mine = list(files.items())[world.rank :: world.ranks]
        return [(path, some) for path, some in mine if not self._is_there(path, some)]

    def _score(self, path: Path, responses: Sequence[Response]) -> None:
        """Write the signals of a file."""
        teacher = self.cached.teacher
        teacher.fetch_ahead(batches_of(responses), lambda tokens: None)
        self.cached.store(path, responses, None)
        teacher.settled(batches_of(responses))

    def _is_there(self, path: Path, responses: Sequence[Response]) -> bool:
        """Whether the file of some responses is whole; that of a window of another size is not."""
        shard = path.with_suffix(".safetensors")
        if not shard.exists():
            return False
        try:
            open_shard = OpenShard(shard)
            found = set(open_shard.addresses)
            open_shard.close()
        except LimbeckError:
            return False
        return found == set(addresses_as_read(responses, self.cached.teacher.reads))
