"""Writing and passes of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from limbeck.models.forward import hidden_states
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan.budget import Budget, TimeIsUp
from limbeck.pipeline.plan.writing_cost import TimedStep, WritingCost
from limbeck.rollouts.collate import collate
from limbeck.sampling.local import LocalSampler, SamplingProgress
from limbeck.types import Response, Sampling, TokenPrompt

# Of its time, what writing in whole batches takes; the smaller one takes the rest.
ALL_ROWS = 0.7
# Batches of answers that are begun at most.
MOST_BATCHES = 6
# Passes of each kind that are timed at most.
MOST_PASSES = 5


@dataclass(frozen=True, kw_only=True)
class Written:
    """What writing for a while showed.

    Attributes:
        ended: answers that ended before they were as long as they may be.
    """

    cost: WritingCost
    ended: int
    tokens: int


def writing(
    sampler: LocalSampler,
    prompts: Sequence[TokenPrompt],
    sampling: Sampling,
    budget: Budget,
    *,
    few: int,
    captures: bool,
) -> Written:
    """Write answers batch by batch, and then some in a smaller batch, as long as there is time.

    Args:
        prompts: `sampler.batch_size` of them or more.
        few: answers of the smaller batch; the cost of a step does not grow in proportion to its rows.

    Raises:
        TimeIsUp: not even one step was done.
    """
    began, allowed, rows = budget.clock(), budget.left, min(sampler.batch_size, len(prompts))
    whole: list[_Watched] = []
    for batch in range(MOST_BATCHES):
        if batch and budget.clock() >= began + ALL_ROWS * allowed:
            break
        some = [prompts[(batch * rows + i) % len(prompts)] for i in range(rows)]
        whole.append(_write(sampler, some, sampling, budget, began + ALL_ROWS * allowed, captures))
    steps = [step for batch in whole for step in batch.steps]
    if not steps:
        raise TimeIsUp
    # The first step of a batch has the pass over its prompts in it.
    mean = sum(len(prompt.ids) for prompt in prompts) / len(prompts)
    firsts = median(batch.first for batch in whole if batch.first)
    prompt = max(firsts - median(step.seconds for step in whole[0].steps or steps), 0.0) / (mean * rows)
    if few < rows:
        steps += _write(sampler, prompts[:few], sampling, budget, began + allowed, captures).steps
    ended, tokens = sum(batch.ended for batch in whole), sum(batch.tokens for batch in whole)
    return Written(cost=WritingCost.of(prompt, steps), ended=ended, tokens=tokens)


def first_words(sampler: LocalSampler, prompts: Sequence[TokenPrompt], sampling: Sampling) -> None:
    """Write a few tokens of one answer: what a process does once, it has done then."""
    replace(sampler, batch_size=1).respond(prompts[:1], replace(sampling, max_new_tokens=3))


@dataclass
class _Watched:
    """Steps of one batch as they come."""

    first: float
    steps: list[TimedStep]
    ended: int = 0
    tokens: int = 0


def _write(
    sampler: LocalSampler,
    prompts: Sequence[TokenPrompt],
    sampling: Sampling,
    budget: Budget,
    until: float,
    captures: bool,
) -> _Watched:
    """The steps of one batch, until there is no more time for them."""
    found = _Watched(first=0.0, steps=[])
    keys, last = sum(len(prompt.ids) for prompt in prompts) / len(prompts), budget.clock()

    def watch(progress: SamplingProgress) -> None:
        nonlocal last
        now = budget.clock()
        rows, place = progress.tokens - found.tokens, len(found.steps) + 1
        if not found.tokens:
            found.first = now - last
        else:
            found.steps.append(TimedStep(rows=rows, keys=keys + place, seconds=now - last))
        found.tokens = progress.tokens
        if place < sampling.max_new_tokens - 1:
            found.ended = progress.responses_done
        last = now
        if now >= until:
            raise TimeIsUp

    watched = replace(sampler, on_progress=watch, batch_size=len(prompts))
    try:
        with budget.watching(sampler.model):
            for _ in watched.respond_in_batches(prompts, sampling, capture_hidden=captures):
                pass
    except TimeIsUp:
        pass
    return found


def pass_seconds(context: RunContext, model: Any, budget: Budget, *, row: int, answer: int) -> float:
    """Seconds of each token in a pass over texts of one length, as many as there is time for.

    Raises:
        TimeIsUp: not even for one of them.
    """
    rows, found = 1, []
    with budget.watching(model), torch.inference_mode():
        while True:
            batch = collate(drawn_texts(rows, row, answer), range(rows), pad_id=0).to(context.device)
            times = []
            while len(times) < MOST_PASSES:
                began = budget.clock()
                try:
                    hidden_states(model, batch)
                except TimeIsUp:
                    break
                times.append(budget.clock() - began)
            if times:
                # The first of several is slower than all that come after it.
                found = [median(times[1:] or times) / (rows * row)]
            if not times or rows == SCORING_BATCH_SIZE:
                break
            rows = SCORING_BATCH_SIZE
    if not found:
        raise TimeIsUp
    return found[0]


def drawn_texts(count: int, row: int, answer: int, vocabulary: int = 256) -> list[Response]:
    """Texts of one length, of ids that every vocabulary has."""
    ids = torch.randint(3, min(vocabulary, 256), (count, row), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Response(
            prompt_id=f"probe-{i}",
            author="teacher",
            prompt_ids=tuple(text[: row - answer]),
            response_ids=tuple(text[row - answer :]),
            stop="length",
        )
        for i, text in enumerate(ids)
    ]
