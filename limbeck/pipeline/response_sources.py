"""Who writes during training, as a recipe says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from limbeck.pipeline.cached_teacher import RoundTeacher
from limbeck.pipeline.engine import Story
from limbeck.pipeline.sampling import own_sampling, sampling_of
from limbeck.pipeline.stages.respond import sampler_for
from limbeck.recipe.sections import OnPolicySection, ResponsesSection
from limbeck.rollouts.io import read_asked
from limbeck.rollouts.replay import Replay, ReplaySettings
from limbeck.rollouts.rounds import BatchSampler, Rounds
from limbeck.rollouts.sources import Author, Fixed, Mixed, Own, Pairs, Pen, Shift, Supply, fixed
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import MixtureSampler, SkdSampler
from limbeck.student.build import Student
from limbeck.teachers.local import LocalTeacher
from limbeck.types import Author as AuthorName
from limbeck.types import Response, Teacher


def author_of(
    story: Story,
    student: Student,
    base: Sequence[Response],
    teacher: Teacher,
    should_stop: Callable[[], bool],
    *,
    aside: frozenset[str] = frozenset(),
) -> Author:
    """The author that a recipe names.

    Args:
        base: the training responses that were there before.
        teacher: judges the student's responses, and writes beside it where the author asks for that.
        aside: ids of prompts that are not trained on.
    """
    section = story.recipe.responses
    if not story.recipe.on_policy:
        return fixed(base)
    assert isinstance(teacher, RoundTeacher), "nobody else can judge what is not written yet"
    prompts = [p for p in read_asked(story.run.responses / "asked.jsonl") if p.id not in aside]
    own = section.on_policy
    writing = _Writing(story, student, teacher.local)

    def begin(shift: Shift) -> Supply:
        pen = Pen(
            sampler=writing.own_sampler(),
            sampling=own_sampling(section),
            rounds=Rounds(
                folder=story.run.rounds,
                keeper=teacher if story.recipe.signal.cache else None,
                world=shift.world,
                should_stop=should_stop,
                report=writing.reporter(),
            ),
            refresh=_refresh(section),
            by_teacher=section.author == "speculative" or own.teacher_share > 0,
            first_tokens=own.first_max_new_tokens,
        )
        if section.author == "pairs":
            sampler = writing.sampler(teacher.local.model, "teacher") if own.resample_teacher else None
            return Pairs(base, prompts, pen, shift, teacher=sampler, teacher_sampling=sampling_of(section))
        mine = Own(prompts, pen, shift)
        if section.author == "mixed":
            start = 0.5 if own.share is None else own.share
            end = start if own.share_end is None else own.share_end
            return Mixed(mine, Fixed(base, shift), share=(start, end), seed=shift.seed)
        if section.author == "replay":
            return Replay(mine, Fixed(base, shift), _replay(own), step_rows=shift.step_rows, seed=shift.seed)
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

    def __init__(self, story: Story, student: Student, teacher: LocalTeacher):
        self.story, self.student, self.teacher = story, student, teacher
        self.template = (story.run.manifest("responses") or {})["template"]

    def sampler(self, model: Any, author: AuthorName) -> LocalSampler:
        batch_size, rule = self.story.recipe.responses.batch_size, self.story.recipe.contrast.rule or {}
        sampler = sampler_for(self.story, model, self.student.tokenizer, self.template, author, batch_size)
        # What was drawn with other weights, or is used once more, has an importance that only this number tells.
        return replace(sampler, keep_logp=author == "student" and rule.get("name") in ("minillm", "importance"))

    def own_sampler(self) -> BatchSampler:
        """The student alone, or with the teacher."""
        section, alone = self.story.recipe.responses, self.sampler(self.student.model, "student")
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
            self.story.console.say(f"write: {author}, {done} of {total} answers")

        return report
