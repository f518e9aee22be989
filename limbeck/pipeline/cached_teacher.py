"""The teacher of an on-policy training: signals of responses on disk are read, those of new ones computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stages.teach import SCORING_BATCH_SIZE
from limbeck.rollouts.collate import collate
from limbeck.teachers.base import Teacher
from limbeck.teachers.stored import OpenShards, require_lengths, shards_of, write_shard
from limbeck.types import DenseSignal, Response, TokenBatch


@dataclass(frozen=True)
class CachedTeacher:
    """Scores new responses, and reads the signals of responses on disk (`rollouts.rounds.SignalCache`).

    Attributes:
        dtype: of the states on disk.
        places: file of the states of each response, by its id.
    """

    teacher: Teacher
    dtype: torch.dtype
    places: dict[str, Path] = field(default_factory=dict)
    _open: OpenShards = field(default_factory=OpenShards)

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """The teacher's distribution at every loss position of the batch.

        A batch with a single new response is scored whole: that depends on what is on disk when its step begins, which
        is the same in a run that was interrupted.
        """
        places = [self.places.get(name) for name in batch.ids]
        if not all(places):
            return self._scored(batch)
        entries = [self._open.entry(place, name) for place, name in zip(places, batch.ids, strict=True) if place]
        require_lengths(next(filter(None, places)), entries, batch)
        head = self.teacher.head
        hidden_ND = torch.cat([entry["hidden"] for entry in entries])
        return DenseSignal(hidden_ND=hidden_ND.to(head.weight_VD.device, head.weight_VD.dtype), head=head)

    def _scored(self, batch: TokenBatch) -> DenseSignal:
        """The signal, computed by the teacher."""
        signal = self.teacher.signal(batch)
        assert isinstance(signal, DenseSignal), "all that a teacher can provide: see limbeck.pipeline.provisions"
        return signal

    def start_round(self, folder: Path) -> None:
        """Delete the signals of the rounds before the one in `folder`, which no step reads again."""

        def earlier(shard: Path) -> bool:
            inside = shard.is_relative_to(folder.parent)
            return inside and int(shard.relative_to(folder.parent).parts[0]) < int(folder.name)

        for name in [name for name, shard in self.places.items() if earlier(shard)]:
            self._open.close(self.places.pop(name))
        for shard in filter(earlier, folder.parent.glob("*/*/*.safetensors")):
            # Another process may have been here first.
            shard.unlink(missing_ok=True)

    def store(self, path: Path, responses: Sequence[Response], hidden: Sequence[Tensor] | None) -> None:
        """Write the hidden states of some responses beside them; compute those that sampling has not."""
        batches: list[TokenBatch] = []
        if hidden is None:
            parts: list[Tensor] = []
            for start in range(0, len(responses), SCORING_BATCH_SIZE):
                some = responses[start : start + SCORING_BATCH_SIZE]
                batches.append(collate(some, range(len(some)), pad_id=0))
                parts += self._scored(batches[-1]).hidden_ND.split([r.tokens for r in some])
            hidden = parts
        states = {response.id: hidden_TD for response, hidden_TD in zip(responses, hidden, strict=True)}
        write_shard(path.with_suffix(".safetensors"), states, dtype=self.dtype)
        self.teacher.settled(batches)

    def register(self, path: Path, responses: Sequence[Response]) -> None:
        """Note that the states of these responses are beside them, unless a run that went further has deleted them."""
        shard = path.with_suffix(".safetensors")
        if not shard.exists():
            return
        self.places.update({r.id: shard for r in responses})


def round_teacher(context: RunContext, base: Iterable[Response], asked: Teacher) -> CachedTeacher:
    """The teacher, with the signals that were stored before training.

    Args:
        base: training responses that were there before.
        asked: the teacher that the training asks.
    """
    teacher = CachedTeacher(asked, getattr(torch, context.recipe.teacher.cache_dtype))
    if context.recipe.teacher.cache:
        shards = shards_of(context.run.signal)
        teacher.places.update({r.id: shards[r.id] for r in base if r.id in shards})
    return teacher
