"""Builds the response source of a training from a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from limbeck.models.whole import reader_copy
from limbeck.pipeline.cached_teacher import CachedTeacher
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.sampled_responses import sampler_for
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.seen_prompts import SeeingSampler
from limbeck.pipeline.served_responses import round_sampler
from limbeck.pipeline.student_engine import student_engine
from limbeck.rollouts.asked import open_asked, with_ids
from limbeck.rollouts.options import Samplers
from limbeck.rollouts.rounds import BatchSampler, Rounds
from limbeck.rollouts.sources import ResponseSource, SourceContext, SourceFactory
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import MixtureSampler, SkdSampler
from limbeck.student.build import Student
from limbeck.types import Author as AuthorName
from limbeck.types import Response, Sampling, SignalSource, TokenPrompt

REPORTED_EVERY_S = 10.0


def response_source_of(
    context: RunContext,
    student: Student,
    base: Sequence[Response],
    teacher: SignalSource,
    should_stop: Callable[[], bool],
    *,
    aside: frozenset[str] = frozenset(),
) -> SourceFactory:
    """The response source that a recipe names.

    Args:
        base: the training responses that were there before.
        teacher: scores the student's responses, and writes beside it where the source asks for that.
        aside: ids of prompts that are not trained on.
    """
    source = context.recipe.responses.source
    prompts: Sequence[TokenPrompt] = ()
    if source.on_policy:
        assert isinstance(teacher, CachedTeacher), "no other teacher can score responses that are not written yet"
        prompts = with_ids(open_asked(context.run.responses / "asked.jsonl"), lambda name: name not in aside)
    samplers = _Samplers(context, student, teacher)

    def begin(source_context: SourceContext) -> ResponseSource:
        rounds = Rounds(
            folder=context.run.rounds,
            signal_cache=teacher if isinstance(teacher, CachedTeacher) and context.recipe.teacher.cache else None,
            world=source_context.world,
            should_stop=should_stop,
            report=samplers.reporter(),
        )
        materials = Materials(
            offline=base,
            prompts=prompts,
            sampling=sampling_of(context.recipe.responses),
            samplers=samplers,
            rounds=rounds,
            context=source_context,
        )
        # Samplers of two models try both when they are made.
        with source_context.whole_student():
            return source.build(materials)

    return begin


@dataclass(frozen=True, kw_only=True)
class Materials:
    """Materials that the recipe's response source is built from (`limbeck.rollouts.options.SourceMaterials`)."""

    offline: Sequence[Response]
    prompts: Sequence[TokenPrompt]
    sampling: Sampling
    samplers: Samplers
    rounds: Rounds
    context: SourceContext


class _Samplers:
    """The samplers of a training, made when they are asked for."""

    def __init__(self, context: RunContext, student: Student, teacher: SignalSource):
        self.context, self.tokens, self.student_model = context, student.tokenizer, student.model
        self._teacher = teacher

    @property
    def model(self) -> Any:
        """The student that writes; of one that is sharded over the ranks, its whole copy."""
        return reader_copy(self.student_model)

    @property
    def _teacher_model(self) -> Any:
        assert isinstance(self._teacher, CachedTeacher), "asked for where the student writes too"
        return self._teacher.teacher.writing().model

    @property
    def _template(self) -> Any:
        return (self.context.run.manifest("respond") or {})["template"]

    def student(self) -> BatchSampler:
        if self.context.recipe.responses.engine.elsewhere:
            return student_engine(self.context, self.model, self.tokens, self._template)
        return self._alone(self.model, "student")

    def teacher(self) -> BatchSampler:
        if self.context.recipe.responses.server is not None:
            sampler: BatchSampler = round_sampler(self.context, self._template)
        else:
            sampler = self._alone(self._teacher_model, "teacher")
        return sampler if self.context.seen is None else SeeingSampler(sampler, self.context.seen)

    def speculative(self, *, top_k: int, redraw: Literal["top_k", "nucleus"]) -> BatchSampler:
        return SkdSampler(**self._of_both(), top_k=top_k, redraw=redraw)

    def mixture(self, *, teacher_share: float) -> BatchSampler:
        return MixtureSampler(**self._of_both(), alpha=teacher_share)

    def _alone(self, model: Any, author: AuthorName) -> LocalSampler:
        batch_size, rule = self.context.recipe.responses.batch_size, self.context.recipe.contrast.rule or {}
        sampler = sampler_for(self.context, model, self.tokens, self._template, author, batch_size)
        # The importance of responses that other weights drew, or that are used again, needs this number.
        return replace(sampler, keep_logp=author == "student" and rule.get("name") in ("minillm", "importance"))

    def _of_both(self) -> dict[str, Any]:
        alone = self._alone(self.model, "student")
        return {
            "model": alone.model,
            "teacher": self._teacher_model,
            "seen": None if self.context.seen is None else self.context.seen.of,
            "eos_token_ids": alone.eos_token_ids,
            "pad_token_id": alone.pad_token_id,
            "vocab_size": alone.vocab_size,
            "tokenizer": alone.tokenizer,
            "batch_size": alone.batch_size,
            "cache_gib": alone.cache_gib,
        }

    def reporter(self) -> Callable[[AuthorName, int, int], None]:
        """What says how far a round is: at its end, and of each author every few seconds."""
        said: dict[AuthorName, float] = {}

        def report(author: AuthorName, done: int, total: int) -> None:
            if done < total and time.monotonic() - said.get(author, -math.inf) < REPORTED_EVERY_S:
                return
            said[author] = time.monotonic()
            self.context.console.say(f"write: {author}, {done} of {total} answers")

        return report
