"""The prompts of a run as its teacher sees them (`teacher.sees`), encoded when they are first asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from limbeck.evaluation.groups.tasks import TasksGroup
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.text_only import text_options
from limbeck.prompts.io import StoredPrompts
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.lengths import check_lengths
from limbeck.prompts.templates import TemplateName, encode_prompts, resolve_template
from limbeck.prompts.turns import has_earlier_answers
from limbeck.recipe.keys import fingerprinted_member
from limbeck.recipe.teacher import SEES_SETTING, WHERE, TeacherSection
from limbeck.rollouts.asked import with_ids
from limbeck.rollouts.rounds import BatchSampler
from limbeck.runtime.records import fingerprint
from limbeck.teachers.base import Teacher
from limbeck.teachers.seeing import SeeingTeacher
from limbeck.teachers.sees import SEES_KEY, View
from limbeck.types import Json, LimbeckError, Prompt, Response, Sampling, SeenPrompt, TokenPrompt, shared_ids


class SeenPrompts:
    """The prompts of a run under the view of its teacher."""

    def __init__(self, context: RunContext):
        self.context = context
        self._ids: dict[str, tuple[int, ...]] = {}

    def teacher(self, inner: Teacher) -> SeeingTeacher:
        """A teacher that reads its prompts so."""
        return SeeingTeacher.of(inner, self.ids, fingerprint(view_inputs(self.context)))

    def prompts(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Prompts as the teacher sees them; of several teachers, as that of the prompt does."""
        return [self._view_of(prompt).of(prompt) for prompt in prompts]

    def _view_of(self, prompt: Prompt) -> View:
        recipe = self.context.recipe
        if recipe.routing is None:
            return recipe.teacher.sees
        return recipe.teachers[recipe.routing.member_of(prompt, tuple(recipe.teachers))].sees

    def ids(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of the prompts with these ids.

        Raises:
            LimbeckError: a template that does not fit what the teacher sees.
        """
        known = self.context.known_prompts
        missing = [known[name] for name in dict.fromkeys(names) if name not in self._ids]
        if missing:
            tokenizer, section = self.context.teacher.tokenizer, self.context.recipe.prompts
            encoded = encode_prompts(
                self.prompts(missing),
                tokenizer,
                self._template,
                control_tokens=section.control_tokens,
                chat_options=text_options(self.context, tokenizer),
            )
            self._ids |= {prompt.id: shared_ids(prompt.ids) for prompt in encoded}
        return [self._ids[name] for name in names]

    def of(self, asked: Sequence[TokenPrompt]) -> list[TokenPrompt]:
        """Prompts as the teacher reads them; its responses are kept as responses to those that were asked."""
        return [
            SeenPrompt(id=own.id, ids=ids, split=own.split, label=own.label, images=own.images, asked=own)
            for own, ids in zip(asked, self.ids([prompt.id for prompt in asked]), strict=True)
        ]

    @cached_property
    def _template(self) -> TemplateName:
        tokenizer, recipe = self.context.teacher.tokenizer, self.context.recipe
        template = resolve_template(recipe.prompts.template, tokenizer, StoredPrompts(self.context.run.prompts))
        turning = next((one.sees for one in recipe.every_teacher.values() if one.sees.needs_turns), None)
        if turning is not None and template != "chat":
            raise LimbeckError(
                f"teacher.sees={SEES_SETTING.name_of(turning)} adds a turn, which template {template} has no words "
                "for; set teacher.sees={name: template, text: ...}, or choose a teacher with a chat template"
            )
        return template


def view_inputs(context: RunContext) -> Json:
    """What the teacher sees, for fingerprints; nothing where that is the student's prompt."""
    if context.seen is None:
        return {}
    return {"sees": [fingerprinted_member(SEES_KEY, one.sees) for one in context.recipe.every_teacher.values()]}


def section_inputs(section: TeacherSection) -> Json:
    """How a teacher runs and what it sees, for fingerprints of several."""
    return {
        "where": fingerprinted_member(WHERE.key, section.where),
        "dtype": section.dtype,
        "attention": section.attn_implementation,
        "sees": fingerprinted_member(SEES_KEY, section.sees),
    }


def views_of(context: RunContext) -> str:
    """What the teacher sees, or the teachers see, in messages."""
    names = (SEES_SETTING.name_of(one.sees) for one in context.recipe.every_teacher.values())
    return " and ".join(dict.fromkeys(names))


def as_seen(context: RunContext, asked: Sequence[TokenPrompt]) -> Sequence[TokenPrompt]:
    """Prompts as the teacher of a run reads them; the same where that is the student's prompt."""
    return asked if context.seen is None else context.seen.of(asked)


def fitting_as_seen(context: RunContext, asked: Sequence[TokenPrompt]) -> tuple[Sequence[TokenPrompt], Sequence[str]]:
    """The prompts that leave room for an answer in the window as the teacher sees them, and the ids of the others.

    Raises:
        LimbeckError: one does not, and such are not dropped.
    """
    if context.seen is None:
        return asked, ()
    from limbeck.pipeline.image_prompts import expanded_lengths

    named = [replace(one, label=f"{one.label} as the teacher sees it") for one in context.seen.of(asked)]
    fitting = check_lengths(
        named,
        window=context.teacher.window or 2**31,
        max_new_tokens=context.recipe.responses.max_new_tokens,
        too_long=context.recipe.prompts.too_long,
        lengths=expanded_lengths(context, named),
    )
    if fitting.dropped:
        context.console.warn(
            f"{len(fitting.dropped)} prompts as the teacher sees them are longer than {fitting.limit} tokens and were "
            "dropped"
        )
    own, more = (sum(len(prompt.ids) for prompt in side) for side in (asked, named))
    context.console.say(
        f"respond: teacher.sees={views_of(context)}: the teacher reads {more / len(asked):.0f} tokens of a prompt on "
        f"average where the student reads {own / len(asked):.0f}"
    )
    kept = {prompt.id for prompt in fitting.kept}
    return with_ids(asked, kept.__contains__), fitting.dropped


def check_sees(context: RunContext) -> None:
    """Check that all that a recipe asks for can give the two models prompts of their own.

    Raises:
        LimbeckError: something gives both the same; names the key to change.
    """
    if context.seen is None:
        return
    for what, remedy in _one_prompt(context):
        raise LimbeckError(f"{what}, but teacher.sees={views_of(context)} shows the teacher another; {remedy}")


def _one_prompt(context: RunContext) -> Iterator[tuple[str, str]]:
    """What reads one prompt with both models, and what to do instead."""
    recipe = context.recipe
    if "speculation" in recipe.evaluate.groups:
        yield (
            "evaluate.groups.speculation drafts and verifies behind one prompt",
            "leave speculation out of evaluate.groups",
        )
    tasks = recipe.evaluate.groups.get("tasks")
    if isinstance(tasks, TasksGroup) and tasks.teacher and recipe.teacher_columns:
        yield (
            "evaluate.groups.tasks.teacher asks the teacher problems that have no column "
            f"{recipe.teacher_columns[0]!r}",
            "set evaluate.groups.tasks.teacher=false",
        )


def require_single_answers(context: RunContext, prompts: Sequence[Prompt]) -> None:
    """Check that no response holds several turns of a conversation: its prompt would be the beginning of one.

    Raises:
        LimbeckError: the data's answers do; names the prompt.
    """
    recipe = context.recipe
    asked = [group for group in recipe.evaluate.groups.values() if "references" in group.needs()]
    from_data = recipe.base_author == "data" or recipe.sft_on_data or bool(asked)
    if context.seen is None or recipe.prompts.loss_on == "last" or not from_data:
        return
    several = next((prompt for prompt in prompts if has_earlier_answers(prompt)), None)
    if several is not None:
        raise LimbeckError(
            f"prompt {prompt_label(several)} is a conversation with earlier answers, which prompts.loss_on=all trains "
            f"on, and teacher.sees={views_of(context)} changes the prompt of its last one alone; set "
            "prompts.loss_on=last"
        )


@dataclass(frozen=True)
class SeeingSampler:
    """A sampler of the teacher's that reads the prompts as the teacher sees them."""

    sampler: BatchSampler
    seen: SeenPrompts

    def respond(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        return self.sampler.respond(self.seen.of(prompts), sampling)

    def plan(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[tuple[int, ...]]:
        return self.sampler.plan(self.seen.of(prompts), sampling)

    def respond_in_batches(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: Sampling,
        *,
        done: Collection[int] = (),
        capture_hidden: bool = False,
    ) -> Iterator[Any]:
        yield from self.sampler.respond_in_batches(
            self.seen.of(prompts), sampling, done=done, capture_hidden=capture_hidden
        )
