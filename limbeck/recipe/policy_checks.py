"""Checks of objectives on whose responses they may be: contrast by author, and pushes of sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping

from limbeck.recipe.response_source import source_name
from limbeck.recipe.sections import Recipe
from limbeck.rollouts.options import OnPolicyOptions, SourceOptions
from limbeck.rollouts.registry import SOURCES
from limbeck.types import LimbeckError


def check_policy(recipe: Recipe) -> None:
    """Check the keys of this kind; see `limbeck.recipe.checks`."""
    _check_contrast(recipe)
    _check_policy(recipe)


def _check_contrast(recipe: Recipe) -> None:
    """Check that keys about the student's responses come with a source in which the student writes."""
    contrast = recipe.contrast
    if not recipe.on_policy:
        for key, there in (("student", contrast.student is not None), ("beta", contrast.beta != "none")):
            if there:
                raise LimbeckError(
                    f"contrast.{key} is for responses of the student, but responses.source="
                    f"{source_name(recipe.responses.source)}; set responses.source={_writing_students()}, or remove it"
                )
    if contrast.beta == "none" and (contrast.scale != 2.0 or contrast.beta_start != 0.5 or contrast.beta_end != 0.75):
        raise LimbeckError("contrast.beta=none reads no scale, beta_start or beta_end; set contrast.beta=constant")
    if contrast.rule is not None:
        name = contrast.rule.get("name")
        if name is None:
            raise LimbeckError(f"contrast.rule is {contrast.rule}; expected a name, such as {{name: adaptive_alpha}}")
        if recipe.teacher.support != "full":
            raise LimbeckError(
                f"contrast.rule={name} asks how likely the teacher finds each token, which teacher.support="
                f"{recipe.teacher.support} does not hold; set teacher.support=full"
            )
        if name == "dpkd" and not recipe.responses.source.paired:
            raise LimbeckError(
                "contrast.rule=dpkd compares pairs, but responses.source="
                f"{source_name(recipe.responses.source)}; set responses.source=pairs"
            )
        if name == "dpkd" and recipe.train.reduction != "sequence":
            raise LimbeckError(
                "contrast.rule=dpkd compares mean log-probabilities, which train.reduction=token weighs by length; "
                "set train.reduction=sequence"
            )


def _check_policy(recipe: Recipe) -> None:
    """Check that policy gradients are taken of responses that the student samples."""
    objective, contrast, source = recipe.objective, recipe.contrast, recipe.responses.source
    rule = (contrast.rule or {}).get("name")
    if recipe.sft is not None and _names(recipe.sft.objective, "opd"):
        raise LimbeckError(
            "sft.objective opd is a gradient over the student's own responses, but sft trains on earlier ones; "
            "set sft.objective={name: ce}, or a divergence"
        )
    if _names([objective.name, objective.options], "opd"):
        what = "objective opd"
    elif _names(contrast.student, "opd"):
        what = "contrast.student opd"
    elif rule in ("minillm", "importance"):
        what = f"contrast.rule={rule}"
    else:
        return
    if not isinstance(source, OnPolicyOptions) or not _may_push(source, what):
        raise LimbeckError(
            f"{what} is a gradient over responses that the current student wrote, but responses.source="
            f"{source_name(source)}; set responses.source=student"
        )
    if source.bias is not None and rule not in ("minillm", "importance"):
        raise LimbeckError(
            f"{what} is biased where the teacher draws too, but {source.bias}; "
            "remove it, or weigh the tokens with contrast.rule={name: importance}"
        )
    for key, plain in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
        value = getattr(recipe.responses, key) if getattr(source, key) is None else getattr(source, key)
        if value != plain:
            raise LimbeckError(
                f"{what} is biased unless the student samples from its whole distribution, but {key} is {value}; "
                f"set responses.source.{key}={plain}"
            )
    if not source.fresh and rule not in ("minillm", "importance"):
        raise _stale(source, what)
    if rule == "minillm":
        _check_untempered(recipe, what, "the current token's part would be tempered and the later ones' not")
    elif _names([objective.name, objective.options], "opd") or _names(contrast.student, "opd"):
        _check_untempered(recipe, "opd", "the student samples at 1, and the tokens would be those of another one")


def _may_push(source: SourceOptions | type[SourceOptions], what: str) -> bool:
    """Whether policy gradients may be taken of this source's responses."""
    if what.startswith("contrast.student"):
        # With an objective of their own the student's may stand beside others, else these would be pushed too.
        return source.pure and not source.replays
    return source.pure and (what == "contrast.rule=importance" or not source.trains_on_initial)


def _stale(source: OnPolicyOptions, what: str) -> LimbeckError:
    """Check that responses of an earlier student have importance weights."""
    lived = f".refresh={source.refresh}" if source.refresh else f"={source_name(source)}"
    fresh = [name for name, member in SOURCES.items() if _may_push(member, what) and not member.whole_epochs]
    remedy = f"={' or '.join(fresh)}" if source.whole_epochs else ".refresh=step"
    return LimbeckError(
        f"{what} is a gradient over responses that the current student wrote, but with responses.source{lived} they "
        f"are used for many steps; set responses.source{remedy}, or weigh the tokens with "
        "contrast.rule={name: importance}"
    )


def _check_untempered(recipe: Recipe, what: str, otherwise: str) -> None:
    """Check that the objective has temperature 1, at which what is said of sampled tokens is the gradient of a KL.

    Args:
        otherwise: what would be wrong.
    """
    for key, plain in (
        ("temperature", (1.0,)),
        ("teacher_temperature", (None, 1.0)),
        ("student_temperature", (None, 1.0)),
        ("temperature_end", (None, 1.0)),
        ("temperature_adapt", (None, 0.0)),
    ):
        value = getattr(recipe.objective, key)
        if value not in plain:
            remedy = f"set objective.{key}=1" if key == "temperature" else f"remove objective.{key}"
            raise LimbeckError(
                f"{what} is the gradient of a divergence at loss temperature 1 alone, but objective.{key} is {value}: "
                f"{otherwise}; {remedy}"
            )


def _names(value: object, objective: str) -> bool:
    """Whether an objective is named anywhere in the options of another."""
    if isinstance(value, Mapping):
        return _names(list(value.values()), objective)
    if isinstance(value, list | tuple):
        return any(_names(part, objective) for part in value)
    return value == objective


def _writing_students() -> str:
    """Names of the sources in which the student writes, those of pairs first."""
    names = [name for name, member in SOURCES.items() if member.on_policy]
    first, *others = sorted(names, key=lambda name: not SOURCES[name].paired)
    return f"{first} (or {', '.join(others)})"
