"""What a recipe's objectives are worth on a signal of the teacher's likeliest tokens: exact, bounded or impossible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from limbeck.objectives.sums import AnyObjective, leaves
from limbeck.pipeline.build import loss_plan_of, sft_loss_plan, temperature_of
from limbeck.pipeline.context import RunContext
from limbeck.recipe.load import Recipe
from limbeck.recipe.teacher import COMBINE, WHERE
from limbeck.types import LimbeckError

Worth = Literal["exact", "bounded", "approximate", "impossible"]

# Divergences that putting all other tokens into one class never makes larger (they process data).
NEVER_LARGER = frozenset({"fkl", "rkl", "symmetric_kl", "jeffreys", "js", "skl", "srkl", "tv", "lk"})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The worth of one objective on a signal, and why."""

    objective: str
    worth: Worth
    why: str


def verdict_of(part: AnyObjective, *, support: str, whole: bool, tempered: bool) -> Verdict:
    """The worth of an objective on the teacher's likeliest tokens at temperature 1.

    Args:
        whole: these are all tokens that there are.
        tempered: the loss has another temperature for the teacher.
    """
    worth: Worth
    if part.reads == {"labels"}:
        worth, why = "exact", "it reads labels alone"
    elif support not in getattr(part, "supports", ()):
        worth, why = "impossible", "it reads the teacher's whole distribution"
    elif tempered and support != "topk_renorm" and not whole:
        worth, why = "impossible", "the mass of all other tokens is known at temperature 1 alone"
    elif whole:
        worth, why = "exact", "all tokens are said"
    elif support == "topk_tail" and part.name in NEVER_LARGER:
        worth, why = "bounded", "never more than over the whole vocabulary; the other tokens count as one"
    else:
        worth, why = (
            "approximate",
            "without a bound; the other tokens " + ("count as one" if support == "topk_tail" else "do not count"),
        )
    return Verdict(objective=part.name, worth=worth, why=why)


def verdicts_of(recipe: Recipe, *, vocab_size: int) -> Iterator[Verdict]:
    """The worth of every objective of a recipe, each once."""
    plans = [(loss_plan_of(recipe), True)] + (
        [] if recipe.sft is None else [(sft_loss_plan(recipe, recipe.sft), False)]
    )
    seen: set[Verdict] = set()
    for plan, main in plans:
        for objective in plan.objectives:
            for _, part in leaves(objective):
                found = verdict_of(
                    part,
                    support=recipe.teacher.support,
                    whole=recipe.teacher.kept >= vocab_size,
                    # Of a mean of probabilities log Z is known at every temperature of the recipe.
                    tempered=main and _tempered(recipe) and not (recipe.mixing is not None and recipe.mixing.of_p),
                )
                if found not in seen:
                    seen.add(found)
                    yield found


def _tempered(recipe: Recipe) -> bool:
    """Whether the teacher's temperature is another than 1 at any time, or the recipe wants to know it at another."""
    temperatures = (temperature_of(recipe).at(progress).teacher_tau for progress in (0.0, 1.0))
    return any(tau != 1 for tau in (*temperatures, *recipe.teacher.support_temperatures))


def check_sparse_teacher(context: RunContext) -> None:
    """Say what the objectives are worth on the likeliest tokens, and refuse those that cannot be computed.

    Raises:
        LimbeckError: an objective is impossible.
    """
    recipe = context.recipe
    where = f"teacher.where={WHERE.name_of(recipe.teacher.where)}"
    where = where if recipe.combine is None else f"combine={COMBINE.name_of(recipe.combine)}"
    verdicts = list(verdicts_of(recipe, vocab_size=context.teacher_card.vocab_size))
    for one in verdicts:
        if one.worth == "impossible":
            remedy = "set objective.temperature=1" if "temperature" in one.why else "choose another objective"
            raise LimbeckError(
                f"objective {one.objective} is impossible on what {where} gives, {_signal(recipe)}: "
                f"{one.why}; {remedy}, or set teacher.where=in_process"
            )
    if not context.run.done("teach"):
        said = "; ".join(f"{one.objective} is {one.worth} ({one.why})" for one in verdicts)
        context.console.say(f"teacher: {_signal(recipe)}: {said}")


def _signal(recipe: Recipe) -> str:
    section = recipe.teacher
    rest = "and the mass of all others" if section.support == "topk_tail" else "and nothing of all others"
    own = f"{section.support_k} tokens of each position"
    own += f", {section.student_k} of the student's choice" if section.student_k else ""
    return f"{own} {rest}, at temperature 1"
