"""Checks, before the first stage, that the teacher provides all that the recipe needs of it."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.pipeline.build import loss_plan_of, sft_loss_plan
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.signal_statement import check_sparse_teacher
from limbeck.recipe.teacher import WHERE
from limbeck.teachers.base import Provision
from limbeck.types import LimbeckError

GROUP_NEEDS: tuple[tuple[str, Provision], ...] = (
    ("teacher", "captured"),
    ("teacher_answers", "writing"),
    ("teacher_weights", "weights"),
)


def check_provisions(context: RunContext) -> None:
    """Check that the teacher provides all that a run needs of it.

    Raises:
        LimbeckError: it gives less; names what asks for it and what to change.
    """
    _check(context, (*_by_training(context), *_by_groups(context)))
    if gives_likeliest_alone(context):
        check_sparse_teacher(context)
    if _asks_teacher(context):
        context.teacher.reach()


def _asks_teacher(context: RunContext) -> bool:
    """Whether anything that is left to do, of what is wanted, asks the teacher how likely it finds tokens."""
    stages = ("teach", "train") if context.recipe.on_policy else ("teach",)
    wanted = context.wanted
    return any(not context.run.done(stage) and (wanted is None or stage in wanted) for stage in stages)


def gives_likeliest_alone(context: RunContext) -> bool:
    """Whether the teacher says no more of a token than which ones are likeliest."""
    given = context.teacher.provides
    return "topk" in given and "hidden" not in given


def check_group_provisions(context: RunContext) -> None:
    """The same check for an evaluation without a run."""
    _check(context, tuple(_by_groups(context)))


def _check(context: RunContext, asked: tuple[tuple[str, Provision, str], ...]) -> None:
    given = context.teacher.provides
    for what, provision, remedy in asked:
        if not given & {provision, *_MORE.get(provision, ())}:
            if context.recipe.mixing is not None:
                raise LimbeckError(
                    f"{what} asks the teacher for its {_ASKED[provision]}, but a mean of several teachers has "
                    f"{'likeliest tokens' if 'topk' in given else 'distributions'} alone and writes nothing; {remedy}, "
                    "or give each prompt one teacher (combine=column)"
                )
            where = WHERE.name_of(context.recipe.teacher.where)
            raise LimbeckError(
                f"{what} asks the teacher for its {_ASKED[provision]}, but teacher.where={where} gives "
                f"{' and '.join(_GIVEN[one] for one in sorted(given)) or 'nothing'}; {remedy}, or set "
                "teacher.where=in_process"
            )


# A teacher that scores or writes any text has what another one would have captured.
_MORE: dict[Provision, tuple[Provision, ...]] = {
    "captured": ("hidden",),
    "topk": ("hidden",),
    "answers": ("writing", "replies"),
    "replies": ("writing",),
}
_ASKED: dict[Provision, str] = {
    "hidden": "distributions",
    "weights": "weights",
    "writing": "answers",
    "captured": "distributions",
    "topk": "likeliest tokens",
    "answers": "answers",
    "replies": "answers",
}
_GIVEN: dict[Provision, str] = {**_ASKED, "captured": "those of captured texts alone", "answers": "captured answers"}


def _by_training(context: RunContext) -> Iterator[tuple[str, Provision, str]]:
    """Who needs it, what is needed, and the remedy."""
    recipe = context.recipe
    if recipe.base_author == "teacher" and recipe.responses.server is None:
        # What it has written with a draft or been marked for is not what it writes without.
        written: Provision = "answers" if recipe.responses.verify is None else "replies"
        written = written if recipe.responses.draft is None else "writing"
        yield "responses.source=teacher", written, "give data with answers and set responses.source=data"
    source = recipe.responses.source
    if source.samples_teacher and not (source.paired and recipe.responses.server is not None):
        yield "responses.source", "writing", "choose a source in which the teacher does not write"
    if recipe.student.model is None and recipe.student.pruned:
        yield f"student.init={recipe.student.init}", "weights", "name a student.model"
    likeliest = gives_likeliest_alone(context)
    sparse = likeliest and recipe.teacher.support in ("topk_tail", "topk_renorm")
    stored: Provision = "topk" if sparse else "captured"
    if recipe.teacher.cache:
        remedy = "set teacher.support=topk_tail" if likeliest else "set teacher.cache=false"
        yield f"teacher.support={recipe.teacher.support}" if likeliest else "teacher.cache=true", stored, remedy
    if recipe.on_policy or loss_plan_of(recipe).needs_teacher:
        scored: Provision = "hidden" if recipe.on_policy and not sparse else stored
        yield f"objective {recipe.objective.name}", scored, "set objective={name: ce} with responses.source=data"
    if recipe.sft is not None and sft_loss_plan(recipe, recipe.sft).needs_teacher:
        # The data's answers are scored as they are trained on.
        yield "sft.objective", "hidden" if recipe.sft_on_data else stored, "set sft.objective={name: ce}"
    if recipe.preference is not None and recipe.preference.pairs.needs_teacher:
        yield "preference.pairs=teacher", "hidden", "let a judge or the data prefer (preference.pairs)"


def _by_groups(context: RunContext) -> Iterator[tuple[str, Provision, str]]:
    # One that says it of its own answers alone scores no fresh ones.
    scores_any = "replies" not in context.teacher.provides
    for name, group in context.recipe.evaluate.groups.items():
        likeliest = gives_likeliest_alone(context) and group.takes_likeliest and (scores_any or not group.scores_fresh)
        for need, least in GROUP_NEEDS:
            if need in group.needs():
                provision: Provision = "hidden" if group.scores_fresh and least == "captured" else least
                provision = "topk" if likeliest and least == "captured" else provision
                yield f"evaluate.groups.{name}", provision, group.teacher_remedy
