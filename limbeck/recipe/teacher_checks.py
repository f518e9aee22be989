"""Checks of the teachers of a recipe: where they are, what they see and what is kept of them."""

from __future__ import annotations

import re
from dataclasses import fields

from limbeck.recipe.response_source import source_name
from limbeck.recipe.sections import Recipe
from limbeck.recipe.teacher import ITSELF, MOVING, WHERE
from limbeck.teachers.hosted_options import OnApi
from limbeck.teachers.in_process import InProcess
from limbeck.teachers.sees import StudentsPrompt
from limbeck.teachers.served_options import OnServer
from limbeck.teachers.sharded import Sharded
from limbeck.teachers.store.teacher import InStore
from limbeck.types import LimbeckError


def check_teachers(recipe: Recipe) -> None:
    """Check the keys of this kind; see `limbeck.recipe.checks`."""
    _check_several(recipe)
    _check_hosted(recipe)
    _check_itself(recipe)
    _check_bits(recipe)
    _check_in_step(recipe)
    _check_axes(recipe)
    _check_students_choice(recipe)
    _check_cache_limit(recipe)
    _check_sees(recipe)


def _check_several(recipe: Recipe) -> None:
    """Check several teachers against each other and their combination."""
    teachers = recipe.teachers
    if recipe.combine is None:
        if teachers:
            raise LimbeckError(
                f"teachers has {', '.join(teachers)}; say how they are combined with combine=column (each prompt's by "
                "a column of the data), rule (by what it asks) or mean_log_p (all score every response)"
            )
        return
    if len(teachers) < 2:
        raise LimbeckError("combine is for several teachers, and there is one; add to teachers, or remove combine")
    recipe.combine.check(tuple(teachers))
    first, *others = teachers.items()
    for name, section in teachers.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            raise LimbeckError(f"teachers has the name {name!r}; expected letters, digits, - and _")
        if section.model in MOVING:
            raise LimbeckError(f"teachers.{name}.model={section.model} changes in every step; set teacher.model alone")
    for name, section in others:
        for f in fields(section):
            if f.name not in _OWN and getattr(section, f.name) != getattr(first[1], f.name):
                raise LimbeckError(
                    f"teachers.{name}.{f.name} is {getattr(section, f.name)!r} and teachers.{first[0]}.{f.name} "
                    f"{getattr(first[1], f.name)!r}; their signal is one, so make them the same"
                )
        if recipe.mixing is not None and section.sees != first[1].sees:
            raise LimbeckError(
                f"teachers.{name}.sees differs from teachers.{first[0]}.sees, and with a mean all score behind one "
                "prompt; make them the same"
            )
    if recipe.student.model is None:
        raise LimbeckError("student.model is missing; of several teachers none is the one to begin as, so name a model")


def _check_hosted(recipe: Recipe) -> None:
    """Check that a hosted teacher has a student whose files can stand for its own."""
    for name, section in recipe.every_teacher.items():
        key = f"teachers.{name}" if name else "teacher"
        if not isinstance(section.where, OnApi):
            continue
        if section.model in ITSELF:
            raise LimbeckError(f"{key}.model={section.model} is the student in this process; remove {key}.where")
        if recipe.student.model is None or recipe.student.init == "teacher":
            raise LimbeckError(
                f"{key}.where=api gives answers and no weights to begin a student from; set student.init=pretrained "
                "and student.model"
            )


def _check_itself(recipe: Recipe) -> None:
    """Check a teacher that is the student itself."""
    teacher, student = recipe.teacher, recipe.student
    if teacher.ema_decay is not None and teacher.model != "ema":
        raise LimbeckError(
            f"teacher.ema_decay is of teacher.model=ema, but teacher.model={teacher.model}; remove it, or change it"
        )
    if teacher.model not in ITSELF:
        return
    if student.init != "pretrained":
        raise LimbeckError(
            f"teacher.model={teacher.model} is the student itself, which student.init={student.init} makes of a "
            "teacher or of nothing; set student.init=pretrained and student.model, or name a model"
        )
    for key, plain in (("revision", None), ("trust_remote_code", False)):
        if getattr(teacher, key) != plain:
            raise LimbeckError(
                f"teacher.{key} is {getattr(teacher, key)!r}, but teacher.model={teacher.model} is the student; "
                f"set student.{key} instead"
            )
    if teacher.model not in MOVING:
        return
    if teacher.model == "live" and isinstance(teacher.sees, StudentsPrompt):
        raise LimbeckError(
            "teacher.model=live is the student as it is, and with teacher.sees=prompt the two are one in every step, "
            "so that nothing is learnt; set teacher.sees to more than the student sees, such as column or system"
        )
    if not isinstance(teacher.where, InProcess):
        raise LimbeckError(f"teacher.model={teacher.model} is the student in this process; remove teacher.where")
    if teacher.cache or teacher.support != "full":
        raise LimbeckError(
            f"teacher.model={teacher.model} changes in every step, so that nothing it says can be kept; "
            "set teacher.cache=false" + ("" if teacher.support == "full" else " and teacher.support=full")
        )
    if teacher.model == "ema" and student.quantize is not None:
        raise LimbeckError(
            "teacher.model=ema averages weights, and student.quantize keeps them on a grid; set teacher.model=base or "
            "live, or remove student.quantize"
        )


def _check_bits(recipe: Recipe) -> None:
    """Check that a teacher in few bits is read by this process, or was when its store was written."""
    for name, section in recipe.every_teacher.items():
        key = f"teachers.{name}" if name else "teacher"
        if section.bits is None:
            continue
        if section.model in ITSELF:
            raise LimbeckError(
                f"{key}.bits is {section.bits}, but {key}.model={section.model} is the student; remove {key}.bits, or "
                "name a model"
            )
        if not isinstance(section.where, InProcess | InStore):
            raise LimbeckError(
                f"{key}.bits is {section.bits}, which is of weights that this process reads whole, and "
                f"{key}.where={WHERE.name_of(section.where)} does not; remove {key}.bits, or set {key}.where=in_process"
            )


def _check_in_step(recipe: Recipe) -> None:
    """Check that the ranks ask a sharded teacher as often as each other, or can attend what others ask."""
    if not any(isinstance(one.where, Sharded) for one in recipe.every_teacher.values()):
        return
    teacher, preference = recipe.teacher, recipe.preference
    alone = {
        "the student writes while it trains (responses.source)": recipe.on_policy,
        "teachers are several (combine)": recipe.combine is not None,
        f"teacher.model={teacher.model} is the student": teacher.model in ITSELF,
        "teacher.cache_limit_gib is set": teacher.cache_limit_gib is not None,
        "teacher.student_k is set": teacher.student_k > 0,
        "preference.pairs asks the teacher": preference is not None and preference.pairs.needs_teacher,
    }
    if (what := next((text for text, is_so in alone.items() if is_so), None)) is not None:
        raise LimbeckError(
            f"teacher.where=sharded is passed through by all ranks at the same time, and {what}, so that one rank "
            "would ask it alone; set teacher.where=in_process, placed or server"
        )


def _check_axes(recipe: Recipe) -> None:
    """Check temperature and support against each other."""
    objective, teacher = recipe.objective, recipe.teacher
    apart = next((s for s in ("teacher_temperature", "student_temperature") if getattr(objective, s) is not None), None)
    for moving in ("temperature_end", "temperature_adapt"):
        if apart is not None and getattr(objective, moving) is not None:
            raise LimbeckError(f"objective.{moving} moves both sides at once; remove objective.{apart}")
    # Only a server that gives no more than these is asked for them while it trains, and a mean that has no more.
    asked = (recipe.mixing is not None and recipe.mixing.of_p) or any(
        isinstance(one.where, OnServer) and one.where.signal_for(one.support) == "topk"
        for one in recipe.every_teacher.values()
    )
    chosen = teacher.student_k and teacher.support in TOPK
    if recipe.on_policy and teacher.support != "full" and not asked and not chosen:
        raise LimbeckError(
            f"teacher.support={teacher.support} is kept on disk before training, but responses.source="
            f"{source_name(recipe.responses.source)} writes during it; set teacher.support=full"
        )
    if teacher.support == "full":
        if teacher.support_temperatures:
            raise LimbeckError(
                "teacher.support_temperatures belongs to a sparse teacher.support; the full one knows them all"
            )
        return
    if not teacher.cache:
        raise LimbeckError(
            f"teacher.support={teacher.support} is what is kept on disk, but teacher.cache is false; "
            "set teacher.cache=true or teacher.support=full"
        )
    if objective.temperature_end is not None and teacher.support != "topk_renorm":
        raise LimbeckError(
            "objective.temperature_end moves the temperature off the grid that teacher.support="
            f"{teacher.support} holds; use teacher.support=full or topk_renorm"
        )


TOPK = ("topk_tail", "topk_renorm")


def _check_students_choice(recipe: Recipe) -> None:
    """Check that a teacher can be asked for the tokens that the student finds likeliest."""
    teacher = recipe.teacher
    if not teacher.student_k:
        return
    where = WHERE.name_of(teacher.where)
    for met, what, remedy in (
        (
            teacher.support not in TOPK,
            f"teacher.support={teacher.support} does not keep the likeliest tokens",
            "set teacher.support=topk_tail",
        ),
        (recipe.combine is not None, "it is asked of one teacher, and there are several", "leave it out"),
        (
            isinstance(teacher.where, OnServer) and teacher.where.api == "llamacpp",
            "llama.cpp says its own likeliest tokens alone",
            "serve the teacher with vLLM or SGLang",
        ),
        (
            isinstance(teacher.where, OnServer) and teacher.where.signal_for(teacher.support) == "hidden",
            "teacher.where.gives=hidden gives the whole distribution",
            "set teacher.support=full and leave it out",
        ),
        (isinstance(teacher.where, OnApi), "a hosted service says its own likeliest tokens alone", "leave it out"),
        (
            isinstance(teacher.where, InStore),
            "a store holds what was captured",
            f"leave it out and set teacher.support_k={teacher.kept}, all tokens that a store captured with it keeps",
        ),
    ):
        if met:
            raise LimbeckError(
                f"teacher.student_k is {teacher.student_k}, but with teacher.where={where} {what}; {remedy}"
            )


def _check_cache_limit(recipe: Recipe) -> None:
    """Check that the signal of a training can be computed a few steps at a time."""
    teacher = recipe.teacher
    if teacher.cache_limit_gib is None:
        return
    source = source_name(recipe.responses.source)
    for met, what, remedy in (
        (not teacher.cache, "teacher.cache is false, so that nothing is kept", "leave it out"),
        (
            recipe.on_policy,
            f"responses.source={source} writes during training, where the signals of one round alone are kept",
            "leave it out",
        ),
        (
            isinstance(teacher.where, InStore),
            "a store that was captured has all signals, and the run keeps none",
            "leave it out",
        ),
        (
            recipe.mixing is not None,
            "a mean of several teachers is put together before training",
            "leave it out, or give each prompt one teacher (combine=column)",
        ),
        (
            teacher.student_k > 0,
            "teacher.student_k keeps what the student chose before training",
            "leave one of the two out",
        ),
    ):
        if met:
            raise LimbeckError(f"teacher.cache_limit_gib is {teacher.cache_limit_gib:g}, but {what}; {remedy}")


# Of several teachers each has its own; all else of the section is of the signal that they give together.
_OWN = ("model", "revision", "dtype", "bits", "attn_implementation", "trust_remote_code", "where", "sees")


def _check_sees(recipe: Recipe) -> None:
    """Check what the teacher sees against the columns that are read."""
    for section in recipe.every_teacher.values():
        section.sees.check()
    left_out = next((name for name in recipe.kept_columns if name in recipe.prompts.ignore_columns), None)
    if left_out is not None:
        key = "combine" if recipe.combine is not None and left_out in recipe.combine.columns else "teacher.sees"
        key = key if left_out in recipe.teacher_columns else "responses.verify.column"
        raise LimbeckError(
            f"prompts.ignore_columns leaves out {left_out!r}, which {key} reads; remove it from one of the two"
        )
