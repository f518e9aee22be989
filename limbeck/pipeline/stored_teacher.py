"""Checks, before the first stage, that a store has what a recipe asks for, in the form it asks for."""

from __future__ import annotations

from limbeck.pipeline.build import loss_plan_of, sparse_form
from limbeck.pipeline.context import RunContext
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.teachers.store.teacher import StoreTeacher
from limbeck.types import LimbeckError


def check_stored(context: RunContext) -> None:
    """Check a teacher in a store: whose it is, what it keeps of each token, and at which temperatures.

    Raises:
        LimbeckError: it was captured from another teacher, or keeps less than the recipe asks for.
    """
    teacher = context.teacher.scorer
    teacher.check()
    if isinstance(teacher, StoreTeacher):
        _check_form(context, teacher)
        _check_heldout(context, teacher)


def _check_form(context: RunContext, teacher: StoreTeacher) -> None:
    form, codec, path = sparse_form(context.recipe), teacher.manifest.codec, teacher.path
    if not loss_plan_of(context.recipe).needs_teacher:
        return
    if isinstance(codec, TopK):
        wanted, kept, k = ("topk_tail", "topk_renorm"), f"the {codec.k} likeliest tokens", codec.k
    elif isinstance(codec, Sampled):
        wanted, kept, k = ("sampled",), f"{codec.draws} draws", codec.draws
    else:
        wanted, kept, k = ("full",), "whole distributions", None
    support = context.recipe.teacher.support
    if support not in wanted:
        raise LimbeckError(
            f"{path} keeps {kept} of each position, but teacher.support={support}; set teacher.support={wanted[0]}"
            + (f" and teacher.support_k={k}" if k else "")
        )
    if form is None:
        return
    if form.k != k:
        raise LimbeckError(f"{path} keeps {kept} of each position, but teacher.support_k is {form.k}; set it to {k}")
    held = teacher.manifest.frame.temperatures
    off = [tau for tau in form.temperatures if tau not in held and tau != 1]
    if off and support != "topk_renorm":
        raise LimbeckError(
            f"{path} is exact at temperature {', '.join(f'{tau:g}' for tau in held)}, but the recipe's is {off[0]:g}; "
            "capture a store with teacher.support_temperatures, or change objective.temperature"
        )


def _check_heldout(context: RunContext, teacher: StoreTeacher) -> None:
    asking = [name for name, group in context.recipe.evaluate.groups.items() if "teacher" in group.needs()]
    if asking and teacher.manifest.heldout.kind != "dense":
        raise LimbeckError(
            f"evaluate.groups.{asking[0]} compares whole distributions, but {teacher.path} keeps less of held-out "
            "texts; leave it out"
        )
