"""Sampling in batches that are kept on disk: after a stop, finished batches are not sampled again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from limbeck.rollouts.io import read_batch, write_responses
from limbeck.runtime.interrupts import GracefulStop
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
) -> tuple[list[Response], tuple[Path, ...]]:
    """Answer the prompts; the answers in the order given, and the files of the batches.

    Args:
        folder: gets a file per batch. Another call with the same prompts and settings goes on where this one stopped.
        watching: opens a bar, given how many answers are there already.
        beside: writes what else belongs to a batch, just before the batch itself.
    """
    plan = sampler.plan(asked, sampling)
    paths = {rows: folder / f"{number:05d}.jsonl" for number, rows in enumerate(plan)}
    done = [row for rows in plan if paths[rows].exists() for row in rows]
    with watching(len(done)) as watched:
        watched_sampler = replace(sampler, on_progress=watched)
        for batch in watched_sampler.respond_in_batches(asked, sampling, done=done, capture_hidden=capture_hidden):
            path = paths[batch.indices]
            with stop.deferred():
                if beside is not None:
                    beside(watched_sampler, batch, path)
                write_responses(path, batch.responses)
            stop.raise_if_requested()
    answers: dict[int, Response] = {}
    for rows, path in paths.items():
        answers |= dict(zip(rows, read_batch(path, len(rows)), strict=True))
    return [answers[i] for i in range(len(asked))], tuple(paths.values())
