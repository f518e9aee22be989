"""The teacher of a training in which responses are written: what it said of kept ones is read, not said again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from limbeck.pipeline.engine import RunContext
from limbeck.pipeline.stages.teach import SCORING_BATCH_SIZE, local_teacher
from limbeck.rollouts.collate import collate
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.stored import OpenShards, shards_of, write_shard
from limbeck.types import DenseSignal, Response, TokenBatch

Ids = tuple[int, ...]


@dataclass(frozen=True)
class CachedTeacher:
    """Judges what is new, and reads what it said of responses that are on disk (flow.Teacher, responses.rounds.Keeper).

    Attributes:
        dtype: of the states on disk.
        places: file and row of the states of each response, by its length and all ids.
    """

    local: LocalTeacher
    dtype: torch.dtype
    places: dict[Ids, tuple[Path, int]] = field(default_factory=dict)
    _open: OpenShards = field(default_factory=OpenShards)

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """The teacher's distribution at every loss position of the batch.

        A batch with a single new response is judged whole: that depends on what is on disk when its step begins, which
        is the same in a run that was interrupted.
        """
        places = [self.places.get(ids) for ids in _keys_of(batch)]
        if not all(places):
            return self.local.signal(batch)
        weight_VD = self.local.head.weight_VD
        hidden_ND = torch.cat([self._open.row(*place)["hidden"] for place in places if place is not None])
        return DenseSignal(hidden_ND=hidden_ND.to(weight_VD.device, weight_VD.dtype), head=self.local.head)

    def start_round(self, folder: Path) -> None:
        """Delete what was said of the rounds before the one in `folder`, which no step reads again."""

        def earlier(shard: Path) -> bool:
            inside = shard.is_relative_to(folder.parent)
            return inside and int(shard.relative_to(folder.parent).parts[0]) < int(folder.name)

        for ids in [ids for ids, (shard, _) in self.places.items() if earlier(shard)]:
            self._open.close(self.places.pop(ids)[0])
        for shard in filter(earlier, folder.parent.glob("*/*/*.safetensors")):
            # Another process may have been here first.
            shard.unlink(missing_ok=True)

    def store(self, path: Path, responses: Sequence[Response], hidden: Sequence[Tensor] | None) -> None:
        """Write the states of some responses beside them; judge those that the teacher has not seen."""
        if hidden is None:
            parts: list[Tensor] = []
            for start in range(0, len(responses), SCORING_BATCH_SIZE):
                some = responses[start : start + SCORING_BATCH_SIZE]
                hidden_ND = self.local.signal(collate(some, range(len(some)), pad_id=0)).hidden_ND
                parts += hidden_ND.split([r.tokens for r in some])
            hidden = parts
        write_shard(path.with_suffix(".safetensors"), dict(enumerate(hidden)), dtype=self.dtype)

    def register(self, path: Path, responses: Sequence[Response]) -> None:
        """These responses have their states beside them, unless a run that went further has deleted them."""
        shard = path.with_suffix(".safetensors")
        if not shard.exists():
            return
        self.places.update({_key(r): (shard, row) for row, r in enumerate(responses)})


def _key(response: Response) -> Ids:
    return (response.tokens, *response.prompt_ids, *response.response_ids)


def _keys_of(batch: TokenBatch) -> list[Ids]:
    """The keys of the responses a batch was made of; the last id of a row is a label alone."""
    counts_B, lengths_B = batch.loss_mask_BT.sum(1), batch.attention_mask_BT.sum(1)
    last_B = batch.labels_N[counts_B.cumsum(0) - 1]
    columns = (counts_B.tolist(), lengths_B.tolist(), last_B.tolist(), batch.input_ids_BT.tolist())
    return [(count, *ids[:length], last) for count, length, last, ids in zip(*columns, strict=True)]


def round_teacher(context: RunContext, base: Mapping[int, Response]) -> CachedTeacher:
    """The teacher itself, and what it said before training.

    Args:
        base: training responses that were there before, by their row on disk.
    """
    teacher = CachedTeacher(local_teacher(context), getattr(torch, context.recipe.signal.dtype))
    if context.recipe.signal.cache:
        shards = shards_of(context.run.signal)
        teacher.places.update({_key(r): (shards[row], row) for row, r in base.items() if row in shards})
    return teacher
