"""Sampling in batches that are kept on disk: after a stop, finished batches are not sampled again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from limbeck.rollouts.batches import BatchedResponses
from limbeck.rollouts.io import write_batch
from limbeck.runtime.interrupts import GracefulStop
from limbeck.runtime.shared_work import EVERYTHING, Share
from limbeck.sampling.local import LocalSampler, SampledBatch, SamplingProgress
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.types import Response, Sampling, TokenPrompt

Watching = Callable[[int], AbstractContextManager[Callable[[SamplingProgress], None]]]


def write_in_batches(
    sampler: LocalSampler | SpeculativeSampler,
    asked: Sequence[TokenPrompt],
    sampling: Sampling,
    folder: Path,
    *,
    stop: GracefulStop,
    watching: Watching,
    capture_hidden: bool = False,
    beside: Callable[[LocalSampler | SpeculativeSampler, SampledBatch, Path], None] | None = None,
    share: Share = EVERYTHING,
) -> tuple[Sequence[Response], tuple[Path, ...]]:
    """Answer the prompts; the answers in the order given, read when they are asked for, and the files of the batches.

    Args:
        folder: gets a file per batch. Another call with the same prompts and settings goes on where this one stopped.
        watching: opens a bar, given how many answers are there already.
        beside: writes what else belongs to a batch, just before the batch itself.
        share: which batches are this process's; of several that share them the first one gets the answers of all, and
            the others none.
    """
    plan = sampler.plan(asked, sampling)
    number_of = {rows: number for number, rows in enumerate(plan)}
    paths = {rows: folder / f"{number:05d}.jsonl" for rows, number in number_of.items()}
    done = [row for rows in plan if paths[rows].exists() for row in rows]
    with watching(len(done)) as watched:

        def step(progress: SamplingProgress) -> None:
            share.step()
            watched(progress)

        own = replace(sampler, on_progress=step, mine=lambda rows: share.take(number_of[rows]))
        for batch in own.respond_in_batches(asked, sampling, done=done, capture_hidden=capture_hidden):
            path = paths[batch.indices]
            with stop.deferred():
                if beside is not None:
                    beside(own, batch, path)
                write_batch(path, batch.responses)
                share.finish(number_of[batch.indices])
            stop.raise_if_requested()
        share.wait()
    joined = {path: rows for rows, path in paths.items()} if share.joins else {}
    return BatchedResponses(joined), tuple(paths.values())
