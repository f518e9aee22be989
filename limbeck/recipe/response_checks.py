"""Checks of the responses of a recipe: who writes them, with what help, and how they are chosen."""

from __future__ import annotations

import re

from limbeck.recipe.response_source import source_name
from limbeck.recipe.sections import Recipe
from limbeck.types import LimbeckError


def check_responses(recipe: Recipe) -> None:
    """Check the keys of this kind; see `limbeck.recipe.checks`."""
    _check_source(recipe)
    _check_server(recipe)
    recipe.responses.engine.check(recipe.responses.source, source_name(recipe.responses.source))
    _check_key_names(recipe)
    _check_draft(recipe)
    _check_verify(recipe)


def _check_source(recipe: Recipe) -> None:
    """Check the response source against the other keys."""
    recipe.responses.source.check(
        max_new_tokens=recipe.responses.max_new_tokens,
        per_device_train_batch_size=recipe.train.per_device_train_batch_size,
    )


def _check_server(recipe: Recipe) -> None:
    server, source = recipe.responses.server, recipe.responses.source
    if server is None:
        return
    if recipe.base_author != "teacher" and not (source.paired and source.samples_teacher):
        raise LimbeckError(
            "responses.server is where the teacher answers, but the responses are those of the data; "
            "remove it, or let the teacher answer (responses.source=teacher)"
        )


def _check_key_names(recipe: Recipe) -> None:
    named: dict[str, object] = {
        "responses.server": recipe.responses.server,
        "responses.engine": recipe.responses.engine,
    }
    for name, section in recipe.every_teacher.items():
        named[f"teachers.{name}.where" if name else "teacher.where"] = section.where
    named |= {f"evaluate.groups.{name}": group for name, group in recipe.evaluate.groups.items()}
    if recipe.responses.verify is not None:
        named["responses.verify.judge"] = recipe.responses.verify.judge
    named |= {"preference.pairs": recipe.preference.pairs} if recipe.preference else {}
    for place, holder in named.items():
        name = getattr(holder, "api_key_env", None)
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # Not repeated: it may be the key itself.
            raise LimbeckError(
                f"{place}.api_key_env is no name of an environment variable; "
                "put the key into one, and its name here, such as OPENAI_API_KEY"
            )


def _check_draft(recipe: Recipe) -> None:
    if recipe.responses.draft is None:
        return
    if recipe.base_author != "teacher":
        raise LimbeckError(
            "responses.draft drafts what the teacher answers, but the responses are those of the data; "
            "remove it, or let the teacher answer (responses.source=teacher)"
        )
    if recipe.responses.server is not None:
        raise LimbeckError(
            "responses.draft drafts for a teacher in this process, but responses.server answers elsewhere; remove one"
        )


def _check_verify(recipe: Recipe) -> None:
    """Answers that are checked are the teacher's, to problems, and are learnt from."""
    prompts, responses, source = recipe.prompts, recipe.responses, recipe.responses.source
    if prompts.generate is not None:
        prompts.generate.check()
        for key, plain in (("source", "builtin"), ("task", None), ("fields", None)):
            if getattr(prompts, key) != plain:
                raise LimbeckError(
                    f"prompts.generate makes the prompts, but prompts.{key} is {getattr(prompts, key)!r}; remove one"
                )
    if prompts.task is not None and prompts.fields is not None:
        raise LimbeckError(
            f"prompts.task={prompts.task} reads the fields of its data set, but prompts.fields names others; "
            "remove prompts.fields"
        )
    verify = responses.verify
    if verify is None:
        return
    if prompts.problems_of is None and verify.by == "task":
        raise LimbeckError(
            "responses.verify checks answers to problems, but the prompts are none; set prompts.task to the task they "
            "are of, such as gsm8k, or responses.verify.by to math or judge, or remove responses.verify"
        )
    if verify.column is not None and verify.by != "math":
        raise LimbeckError(
            f"responses.verify.column is for responses.verify.by=math, but it is {verify.by}; change it, or leave "
            "column out"
        )
    if (verify.judge is not None) != (verify.by == "judge"):
        remedy = (
            "give responses.verify.judge={base_url: ...}" if verify.judge is None else "set responses.verify.by=judge"
        )
        raise LimbeckError(
            f"responses.verify.by is {verify.by} and responses.verify.judge is "
            f"{'missing' if verify.judge is None else 'given'}; {remedy}"
        )
    if verify.by == "judge" and verify.samples == 1:
        raise LimbeckError(
            "responses.verify.by=judge chooses among several answers, but responses.verify.samples is 1; set it to 2 "
            "or more"
        )
    if recipe.base_author != "teacher":
        raise LimbeckError(
            "responses.verify checks the teacher's answers, but those that are there before training are the data's; "
            "set responses.source=teacher (or responses.initial_author), or remove responses.verify"
        )
    if not source.trains_on_initial and not recipe.sft_on_responses:
        raise LimbeckError(
            f"responses.verify checks answers of the teacher, but responses.source={source_name(source)} trains on "
            "none of them; remove responses.verify, or choose a source such as teacher or mixed"
        )
    if source.paired and source.samples_teacher:
        raise LimbeckError(
            "responses.verify checks the answers that are there before training, but the teacher writes them anew in "
            "every round; set responses.source.resample_teacher=false"
        )
    if verify.samples > 1 and responses.temperature == 0:
        raise LimbeckError(
            f"responses.verify.samples={verify.samples} at temperature 0 would write the same answer "
            f"{verify.samples} times; set responses.temperature above 0, or samples=1"
        )
