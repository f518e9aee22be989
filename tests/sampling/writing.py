"""A sampler that costs nothing, and what the tests of authors need around it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from limbeck.rollouts.rounds import Rounds
from limbeck.rollouts.sources import ResponseSource, SourceContext, StepCounter
from limbeck.rollouts.student import RolloutConfig, StudentSource
from limbeck.sampling.local import SampledBatch, in_order
from limbeck.types import Author, Response, Sampling, TokenPrompt


@dataclass
class FakeSampler:
    """Writes numbers that are a function of the prompt, the sampling settings, the author and the weights.

    Attributes:
        weights: stands for the state of the model; it is also the first id of every response.
        drawn: how often each prompt was answered with each seed.
    """

    author: Author = "student"
    batch_size: int = 4
    weights: int = 0
    drawn: Counter[tuple[str, int]] = field(default_factory=Counter)

    def plan(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[tuple[int, ...]]:
        rows = range(len(prompts))
        return [tuple(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def respond_in_batches(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: Sampling,
        *,
        done: Collection[int] = (),
        capture_hidden: bool = False,
    ) -> Iterator[SampledBatch]:
        assert not capture_hidden, "it has no hidden states to give"
        for rows in self.plan(prompts, sampling):
            if not set(rows) <= set(done):
                answers = tuple(self._answer(prompts[row], sampling) for row in rows)
                yield SampledBatch(indices=rows, responses=answers, hidden=None)

    def respond(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        return in_order(self.respond_in_batches(prompts, sampling), len(prompts))

    def _answer(self, prompt: TokenPrompt, sampling: Sampling) -> Response:
        self.drawn[prompt.id, sampling.seed] += 1
        draw = random.Random(f"{prompt.id} {sampling.seed} {self.author} {self.weights}")
        ids = [self.weights, *(draw.randrange(3, 1000) for _ in range(draw.randrange(sampling.max_new_tokens)))]
        return Response(
            prompt_id=prompt.id,
            author=self.author,
            prompt_ids=prompt.ids,
            response_ids=tuple(ids),
            stop="length",
            sampling=sampling,
            logp=tuple(-draw.random() for _ in ids),
        )


R = TypeVar("R")


@dataclass(kw_only=True)
class Together:
    """A rank of several threads."""

    rank: int
    ranks: int
    barrier: threading.Barrier
    boxes: list[list[Any]]

    def wait(self) -> None:
        self.barrier.wait(20)

    def gather(self, items: list[Any]) -> list[Any]:
        self.boxes[self.rank] = items
        self.wait()
        every = [item for box in self.boxes for item in box]
        self.wait()
        return every


def on_ranks(ranks: int, work: Callable[[Together], R]) -> list[R]:
    """What some work ends with on each of several ranks, which are threads; an error in its place."""
    barrier, boxes = threading.Barrier(ranks), [[] for _ in range(ranks)]
    found: dict[int, Any] = {}

    def play(rank: int) -> None:
        try:
            found[rank] = work(Together(rank=rank, ranks=ranks, barrier=barrier, boxes=boxes))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(ranks)]


def prompts_of(count: int, *, seed: int = 5) -> list[TokenPrompt]:
    """Prompts of different lengths."""
    draw = random.Random(seed)
    return [TokenPrompt(id=f"p{i}", ids=tuple(range(1, draw.randint(2, 9)))) for i in range(count)]


def base_of(prompts: Sequence[TokenPrompt]) -> list[Response]:
    """What the teacher had answered before."""
    return FakeSampler(author="teacher", weights=999).respond(prompts, Sampling(max_new_tokens=12, seed=77))


def pen_of(sampler: FakeSampler, folder: Path, *, refresh: int | None = 1, **changes: Any) -> RolloutConfig:
    """Writes in `folder`; changes are those of `Rounds` and `Pen`."""
    rounds = {key: changes.pop(key) for key in ("world", "should_stop", "report") if key in changes}
    sampling = Sampling(max_new_tokens=12, seed=3, stop=("\n",))
    return RolloutConfig(
        sampler=sampler, sampling=sampling, rounds=Rounds(folder=folder, **rounds), refresh=refresh, **changes
    )


def own_of(
    sampler: FakeSampler,
    folder: Path,
    *,
    prompts: int = 10,
    step_rows: int = 4,
    refresh: int | None = 1,
    asked: Sequence[TokenPrompt] | None = None,
    **changes: Any,
) -> StudentSource:
    """The student's own responses."""
    rollout = pen_of(sampler, folder, refresh=refresh, **changes)
    return StudentSource(
        prompts_of(prompts) if asked is None else asked, rollout, SourceContext(step_rows=step_rows, seed=11)
    )


def played(
    response_source: ResponseSource, steps: range, total: int, *, train: FakeSampler | None = None
) -> list[dict[int, Response]]:
    """The responses of some steps, the weights moving after each where a sampler is given."""
    found = []
    for step in steps:
        if train is not None:
            train.weights = step
        found.append(response_source.step(StepCounter(step=step, total=total)))
    return found


def asked_in(step: dict[int, Response]) -> set[str]:
    return {r.prompt_id for r in step.values()}
