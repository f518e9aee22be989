"""Rollout rounds: responses to the prompts, sampled anew during training and kept on disk.

    rounds/003/student/00000.jsonl ...         one file per batch of the sampler; whole or not there
    rounds/003/student/00000.jsonl.sha256 ...  its checksum
    rounds/003/student/00000.safetensors ...   what the teacher says of it, until the next round begins
    rounds/003/student/round.arrow             all of it for training, which reads the rows it is at
    rounds/003/student/round.json              the hashes of all, once the round is whole

A round depends on the weights at the step that first asks for it, its number and the recipe. The loop keeps a
checkpoint where a round begins, so that a run that was killed while it wrote continues with the very next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from limbeck.rollouts.io import read_responses, write_batch
from limbeck.rollouts.round_table import TABLE, WHOLE, in_round, is_recorded, write_table
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import read_sealed
from limbeck.types import Author, Interrupted, LimbeckError, Response, Sampling, TokenPrompt

if TYPE_CHECKING:
    from torch import Tensor


class ProcessGroup(Protocol):
    """The processes of a launch that share the sampling."""

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks, in the order of the ranks."""
        ...

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """One process."""

    rank: int = 0
    ranks: int = 1

    def gather(self, items: list[Any]) -> list[Any]:
        return items

    def wait(self) -> None:
        return


class BatchSampler(Protocol):
    """A sampler that yields its batches as they end (`LocalSampler`, and those with two models)."""

    def respond(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]: ...
    def plan(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[tuple[int, ...]]: ...
    def respond_in_batches(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: Sampling,
        *,
        done: Collection[int] = (),
        capture_hidden: bool = False,
    ) -> Iterator[Any]: ...


class SignalCache(Protocol):
    """A cache of teacher signals beside the responses, so that a response used twice is scored once."""

    def start_round(self, folder: Path) -> None:
        """Called before a round is written in `folder`; the responses of earlier rounds are not used again."""
        ...

    def store(self, path: Path, responses: Sequence[Response], hidden: Sequence[Tensor] | None) -> None:
        """Store the signals of responses, before these are written to `path`.

        Args:
            hidden: the teacher's states that predicted them, where it wrote too.
        """
        ...

    def register(self, path: Path) -> None:
        """Called before the responses of a file are used."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The folder of rounds.

    Attributes:
        signal_cache: keeps what the teacher says; None where the teacher is asked at every use.
        should_stop: asked after each batch.
        report: called with (author, answers written, answers in all) after each batch.
    """

    folder: Path
    signal_cache: SignalCache | None = None
    world: ProcessGroup = field(default_factory=SingleProcess)
    should_stop: Callable[[], bool] = lambda: False
    report: Callable[[Author, int, int], None] = lambda author, done, total: None

    def write(
        self,
        number: int,
        author: Author,
        sampler: BatchSampler,
        prompts: Sequence[TokenPrompt],
        sampling: Sampling,
        *,
        by_teacher: bool = False,
    ) -> Sequence[Response]:
        """The responses of a round in the order of the prompts; only what is not on disk yet is sampled.

        Ranks take turns with the batches. All stay on disk.

        Args:
            by_teacher: the teacher writes (alone or too), so that the sampler's hidden states are the teacher's.

        Raises:
            Interrupted: `should_stop` said so; the batches that ended are on disk.
            LimbeckError: on all ranks: a batch is not what was written.
        """
        folder = self.folder / f"{number:03d}" / author
        self._require_unchanged(folder)
        if self.signal_cache is not None:
            self.signal_cache.start_round(folder.parent)
        sampling = for_round(sampling, number)
        plan = sampler.plan(prompts, sampling)
        paths = {rows: folder / f"{i:05d}.jsonl" for i, rows in enumerate(plan)}
        mine = plan[self.world.rank :: self.world.ranks]
        left = {rows for rows in mine if not paths[rows].exists()}
        others = {row for rows in plan if rows not in left for row in rows}
        written = len(others)
        capture = {"capture_hidden": True} if by_teacher and self.signal_cache is not None else {}
        for batch in sampler.respond_in_batches(prompts, sampling, done=others, **capture):
            responses = in_round(batch.responses, number)
            if self.signal_cache is not None:
                self.signal_cache.store(paths[batch.indices], responses, batch.hidden)
            write_batch(paths[batch.indices], responses)
            written += len(responses)
            self.report(author, written, len(prompts))
            if self.world.ranks == 1 and self.should_stop():
                raise Interrupted(f"stopped while {author} responses of round {number} were written")
        self._score_again((paths[rows] for rows in mine), number)
        self.world.wait()
        if self.signal_cache is not None:
            for path in paths.values():
                self.signal_cache.register(path)
        self._require_table(folder, number, paths)
        # Arrow takes a while to import, and recipes are read without it.
        from limbeck.rollouts.table import open_responses

        places = np.empty(len(prompts), np.int32)
        places[np.fromiter(chain.from_iterable(plan), np.int32, len(prompts))] = np.arange(len(prompts))
        return open_responses(folder / TABLE).taken(places)

    def _require_table(self, folder: Path, number: int, batches: Mapping[tuple[int, ...], Path]) -> None:
        """See that a round stands in its table, batch behind batch, and is recorded as whole; the first rank does it.

        Raises:
            LimbeckError: on all ranks: a batch is not what was written.
        """
        failure = ""
        if self.world.rank == 0 and not is_recorded(folder / TABLE):
            try:
                write_table(folder, number, batches)
            except LimbeckError as error:
                # All ranks end with it, or the others would wait for this one.
                failure = str(error)
        if failure := self.world.gather([failure])[0]:
            raise LimbeckError(failure)

    def is_whole(self, number: int, author: Author) -> bool:
        """Whether all responses of a round are on disk."""
        return (self.folder / f"{number:03d}" / author / WHOLE).exists()

    def _score_again(self, paths: Iterable[Path], number: int) -> None:
        """Store the teacher signals of responses that are used once more: it goes when the next round begins, and a
        training that had come there may have had to go back for want of a whole checkpoint."""
        for path in paths:
            if self.signal_cache is not None and not path.with_suffix(".safetensors").exists():
                self.signal_cache.store(path, in_round(read_responses(path), number), None)

    def _require_unchanged(self, folder: Path) -> None:
        """Check that a finished round is unchanged, but for its teacher signals: it could not be written again.

        Raises:
            LimbeckError: it is not.
        """
        record = folder / WHOLE
        if not record.exists():
            return
        for name, digest in read_sealed(record)["files"].items():
            path = folder / name
            # The table is made of the others once more where it is not what was written.
            if name != TABLE and (path.exists() or path.suffix == ".jsonl"):
                if path.exists() and sha256_of(path) == digest:
                    continue
                raise LimbeckError(
                    f"{path} is missing or not what was written, and the weights that wrote it are gone; delete "
                    f"{self.folder} and {self.folder.with_name('checkpoints')} and run the same command again to "
                    "train from the start"
                )


def for_round(sampling: Sampling, number: int) -> Sampling:
    """The sampling settings with the seed of a round, so that a prompt gets a new answer in each."""
    return replace(sampling, seed=sampling.seed * 1_000_003 + number + 1)
