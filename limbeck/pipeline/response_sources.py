"""Builds the response source of a training from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from limbeck.pipeline.cached_teacher import CachedTeacher
from limbeck.pipeline.engine import RunContext
from limbeck.pipeline.sampling import own_sampling, sampling_of
from limbeck.pipeline.stages.respond import sampler_for
from limbeck.recipe.sections import OnPolicySection, ResponsesSection
from limbeck.rollouts.io import read_asked
from limbeck.rollouts.replay import ReplaySettings, ReplaySource
from limbeck.rollouts.rounds import BatchSampler, Rounds
from limbeck.rollouts.sources import (
    MixedSource,
    OfflineSource,
    PairedSource,
    ResponseSource,
    RolloutConfig,
    SourceContext,
    SourceFactory,
    StudentSource,
    offline,
)
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import MixtureSampler, SkdSampler
from limbeck.student.build import Student
from limbeck.teachers.local import LocalTeacher
from limbeck.types import Author as AuthorName
from limbeck.types import Response, Teacher


def author_of(
    context: RunContext,
    student: Student,
    base: Sequence[Response],
    teacher: Teacher,
    should_stop: Callable[[], bool],
    *,
    aside: frozenset[str] = frozenset(),
) -> SourceFactory:
    """The author that a recipe names.

    Args:
        base: the training responses that were there before.
        teacher: judges the student's responses, and writes beside it where the author asks for that.
        aside: ids of prompts that are not trained on.
    """
    section = context.recipe.responses
    if not context.recipe.on_policy:
        return offline(base)
    assert isinstance(teacher, CachedTeacher), "nobody else can judge what is not written yet"
    prompts = [p for p in read_asked(context.run.responses / "asked.jsonl") if p.id not in aside]
    own = section.on_policy
    writing = _Writing(context, student, teacher.local)

    def begin(source_context: SourceContext) -> ResponseSource:
        rollout = RolloutConfig(
            sampler=writing.own_sampler(),
            sampling=own_sampling(section),
            rounds=Rounds(
                folder=context.run.rounds,
                signal_cache=teacher if context.recipe.signal.cache else None,
                world=source_context.world,
                should_stop=should_stop,
                report=writing.reporter(),
            ),
            refresh=_refresh(section),
            by_teacher=section.author == "speculative" or own.teacher_share > 0,
            first_tokens=own.first_max_new_tokens,
        )
        if section.author == "pairs":
            sampler = writing.sampler(teacher.local.model, "teacher") if own.resample_teacher else None
            return PairedSource(
                base, prompts, rollout, source_context, teacher=sampler, teacher_sampling=sampling_of(section)
            )
        mine = StudentSource(prompts, rollout, source_context)
        if section.author == "mixed":
            start = 0.5 if own.share is None else own.share
            end = start if own.share_end is None else own.share_end
            return MixedSource(mine, OfflineSource(base, source_context), share=(start, end), seed=source_context.seed)
        if section.author == "replay":
            return ReplaySource(
                mine,
                OfflineSource(base, source_context),
                _replay(own),
                step_rows=source_context.step_rows,
                seed=source_context.seed,
            )
        return mine

    return begin


def _refresh(section: ResponsesSection) -> int | None:
    """Steps that share a round; None is an epoch."""
    refresh = section.on_policy.refresh
    if refresh is None:
        return None if section.author == "pairs" else 1
    return {"step": 1, "epoch": None}[refresh] if isinstance(refresh, str) else refresh


def _replay(own: OnPolicySection) -> ReplaySettings:
    share = {} if own.share is None else {"share": own.share}
    return ReplaySettings(
        **share,
        capacity=own.buffer,
        decay=own.decay,
        tolerance=own.tolerance,
        bump=own.bump,
        compare_with=own.compare_with,
        validation_steps=own.validate_steps,
    )


class _Writing:
    """The samplers of a training."""

    def __init__(self, context: RunContext, student: Student, teacher: LocalTeacher):
        self.context, self.student, self.teacher = context, student, teacher
        self.template = (context.run.manifest("responses") or {})["template"]

    def sampler(self, model: Any, author: AuthorName) -> LocalSampler:
        batch_size, rule = self.context.recipe.responses.batch_size, self.context.recipe.contrast.rule or {}
        sampler = sampler_for(self.context, model, self.student.tokenizer, self.template, author, batch_size)
        # What was drawn with other weights, or is used once more, has an importance that only this number tells.
        return replace(sampler, keep_logp=author == "student" and rule.get("name") in ("minillm", "importance"))

    def own_sampler(self) -> BatchSampler:
        """The student alone, or with the teacher."""
        section, alone = self.context.recipe.responses, self.sampler(self.student.model, "student")
        own = section.on_policy
        shared: Any = {
            "model": alone.model,
            "teacher": self.teacher.model,
            "eos_token_ids": alone.eos_token_ids,
            "pad_token_id": alone.pad_token_id,
            "vocab_size": alone.vocab_size,
            "tokenizer": alone.tokenizer,
            "batch_size": alone.batch_size,
        }
        if section.author == "speculative":
            return SkdSampler(**shared, top_k=own.teacher_top_k, redraw=own.teacher_redraw)
        if own.teacher_share:
            return MixtureSampler(**shared, alpha=own.teacher_share)
        return alone

    def reporter(self) -> Callable[[AuthorName, int, int], None]:
        def report(author: AuthorName, done: int, total: int) -> None:
            self.context.console.say(f"write: {author}, {done} of {total} answers")

        return report
