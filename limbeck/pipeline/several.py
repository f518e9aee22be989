"""Several teachers in a run: which one each prompt has, who writes for it, and what cannot be had of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from limbeck.models.vocabulary import compare_vocabularies
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.seen_prompts import section_inputs
from limbeck.recipe.keys import fingerprinted_member
from limbeck.recipe.load import signal_temperatures
from limbeck.recipe.teacher import COMBINE
from limbeck.rollouts.asked import ids_of
from limbeck.rollouts.table import ResponseTable
from limbeck.runtime.records import fingerprint
from limbeck.teachers.base import Teacher, TeacherModel
from limbeck.teachers.combinations import COMBINE_KEY
from limbeck.teachers.several import SeveralTeachers
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.teachers.store.teacher import StoreTeacher
from limbeck.types import Json, LimbeckError, Prompt, TokenPrompt


def several_teachers(context: RunContext, members: Mapping[str, Teacher]) -> SeveralTeachers:
    """The teachers of a run as one."""
    routing, mixing = context.recipe.routing, context.recipe.mixing
    assert routing or mixing, "a combination is one of the two"
    first = next(iter(members.values()))
    return SeveralTeachers(
        model=TeacherModel(model=" and ".join(member.model.model for member in members.values())),
        device=first.device,
        members=members,
        member_of=context.member_of if routing else None,
        weights_of=mixing.weights_of(tuple(members)) if mixing else None,
        of_p=mixing is not None and mixing.of_p,
        sparse=any(says_likeliest(member) for member in members.values()) or (mixing is not None and mixing.of_p),
        temperatures=signal_temperatures(context.recipe),
        support_k=context.recipe.teacher.support_k,
        combination=fingerprint(combination_inputs(context)),
    )


def combination_inputs(context: RunContext) -> Json:
    """How teachers are combined, and each of them, for fingerprints; nothing where there is one."""
    combination = context.recipe.combine
    if combination is None:
        return {}
    members = {name: section_inputs(section) for name, section in context.recipe.teachers.items()}
    return {"combine": fingerprinted_member(COMBINE_KEY, combination), "members": members}


def check_several(context: RunContext) -> None:
    """Check that several teachers have the same tokens, and that nothing asks for one model of them.

    Raises:
        LimbeckError: they have not, or something does; names the key to change.
    """
    recipe = context.recipe
    if recipe.combine is None:
        return
    teachers = context.run_teachers
    (first, one), *others = teachers.items()
    for name, other in others:
        differences = compare_vocabularies(one.vocabulary, other.vocabulary).differences
        if differences:
            raise LimbeckError(
                f"teachers.{first} ({one.model.model}) and teachers.{name} ({other.model.model}) have different "
                f"tokens: {differences[0]}; several teachers must share one tokenizer"
            )
        if one.vocabulary.chat_template != other.vocabulary.chat_template:
            context.console.warn(
                f"teachers.{name} has another chat template than teachers.{first}, whose template makes all prompts"
            )
    for name, teacher in teachers.items():
        _check_put_together(context, name, teacher)
    for what, remedy in _one_model(context):
        raise LimbeckError(f"{what} asks for one model, but there are {len(teachers)} teachers; {remedy}")


def says_likeliest(teacher: Teacher) -> bool:
    """Whether a teacher says no more of a token than which ones are likeliest, now or in its store."""
    if isinstance(teacher, StoreTeacher):
        return isinstance(teacher.manifest.codec, TopK | Sampled)
    return "topk" in teacher.provides and "hidden" not in teacher.provides


def _check_put_together(context: RunContext, name: str, teacher: Teacher) -> None:
    """Check that what a teacher says can be put together with what the others say, exactly.

    Raises:
        LimbeckError: it cannot.
    """
    recipe, codec = context.recipe, teacher.manifest.codec if isinstance(teacher, StoreTeacher) else None
    if isinstance(codec, Sampled):
        raise LimbeckError(
            f"teachers.{name} has a store of samples, which are not put together with what other teachers say; capture "
            "a store with teacher.support=full or topk_tail"
        )
    if recipe.mixing is not None and says_likeliest(teacher):
        raise LimbeckError(
            f"teachers.{name} says its likeliest tokens alone, of which combine={COMBINE.name_of(recipe.mixing)} has "
            "no exact mean; give each prompt one teacher (combine=column), or take a teacher that gives whole "
            "distributions (teacher.support=full)"
        )
    new_texts = recipe.on_policy or not recipe.teacher.cache
    if new_texts and isinstance(teacher, StoreTeacher) and context.run_teacher.provides & {"topk"}:
        raise LimbeckError(
            f"teachers.{name} has a store of texts that were captured, and no others can be scored with it; set "
            "responses.source=teacher or data with teacher.cache=true, or let the model score"
        )
    if isinstance(codec, TopK) and codec.k != recipe.teacher.support_k:
        raise LimbeckError(
            f"teachers.{name} has a store of {codec.k} tokens of each position, but teacher.support_k is "
            f"{recipe.teacher.support_k}; set it to {codec.k} for all teachers"
        )


def _one_model(context: RunContext) -> Iterator[tuple[str, str]]:
    """What needs one model of a teacher, and what to do instead."""
    recipe, groups = context.recipe, context.recipe.evaluate.groups
    source = recipe.responses.source
    if getattr(source, "by_teacher", False):
        yield "responses.source", "choose a source in which the teacher does not write beside the student"
    if source.samples_teacher:
        yield "responses.source", "set responses.source.resample_teacher=false"
    if recipe.responses.server is not None:
        yield "responses.server", "let the teachers answer in this process, or give data with answers"
    for name in ("speculation", "cost"):
        if name in groups:
            yield f"evaluate.groups.{name}", f"leave {name} out of evaluate.groups"


def check_routes(context: RunContext, prompts: Sequence[Prompt]) -> None:
    """Check that every prompt has a teacher and every teacher a prompt to train on, and say how many.

    Raises:
        LimbeckError: one has none; names the row or the teacher.
    """
    recipe = context.recipe
    routing = recipe.routing
    if routing is None:
        return
    names = tuple(recipe.teachers)
    found = [(prompt.split, routing.member_of(prompt, names)) for prompt in prompts]
    taken = Counter(name for split, name in found if split == "train")
    idle = next((name for name in names if name not in taken), None)
    if idle is not None:
        how = COMBINE.name_of(routing)
        raise LimbeckError(
            f"combine={how} gives teachers.{idle} no training prompt (the {len(found)} prompts are of "
            f"{', '.join(sorted({name for _, name in found}))}); correct the data or the rule, or remove the teacher"
        )
    context.console.say(f"prompts: to train on, {', '.join(f'{taken[name]} of {name}' for name in names)}")


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A teacher with the prompts that it answers.

    Attributes:
        folder: name of a folder for what it writes; empty where it alone writes.
        places: of its prompts among all.
    """

    teacher: Teacher
    folder: str
    places: Sequence[int]


def writers(context: RunContext, asked: Sequence[TokenPrompt]) -> list[Answering]:
    """The teachers that answer some prompts, each with its own."""
    if context.recipe.combine is None:
        return [Answering(teacher=context.teacher, folder="", places=range(len(asked)))]
    names = [context.member_of(name) for name in ids_of(asked)]
    return [
        Answering(teacher=teacher, folder=name, places=tuple(i for i, own in enumerate(names) if own == name))
        for name, teacher in context.run_teachers.items()
        if name in names
    ]


def by_teacher(context: RunContext, responses: ResponseTable) -> list[ResponseTable]:
    """Responses in groups that one teacher scores, so that one is in memory at a time."""
    if context.recipe.routing is None:
        return [responses]
    groups: dict[str, list[int]] = {name: [] for name in context.recipe.teachers}
    for place, prompt_id in zip(responses.places.tolist(), responses.prompt_ids, strict=True):
        groups[context.member_of(prompt_id)].append(place)
    return [responses.taken(np.array(places)) for places in groups.values() if places]
