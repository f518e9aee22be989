"""Checks of keys of a recipe that do not go together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from limbeck.recipe.preference import SMOOTHED
from limbeck.recipe.response_source import source_name
from limbeck.recipe.sections import AXES, Recipe
from limbeck.recipe.teacher import ITSELF, MOVING
from limbeck.rollouts.options import OnPolicyOptions, SourceOptions
from limbeck.rollouts.preference.options import JudgePairs
from limbeck.rollouts.registry import SOURCES
from limbeck.teachers.hosted_options import OnApi
from limbeck.teachers.in_process import InProcess
from limbeck.teachers.sees import StudentsPrompt
from limbeck.teachers.served import OnServer
from limbeck.types import LimbeckError


def check(recipe: Recipe) -> None:
    parts = Path(recipe.name).parts
    if not parts or ".." in parts or Path(recipe.name).is_absolute() or not recipe.name.isprintable():
        raise LimbeckError(f"name: got {recipe.name!r}; expected a plain name, a path belongs in output_dir")
    reserved = sorted({*AXES, "options"} & recipe.objective.options.keys())
    if reserved:
        raise LimbeckError(f"objective.options holds {reserved[0]!r}; write it as objective.{reserved[0]}")
    _check_several(recipe)
    _check_hosted(recipe)
    _check_itself(recipe)
    _check_axes(recipe)
    _check_sees(recipe)
    _check_source(recipe)
    _check_contrast(recipe)
    _check_policy(recipe)
    _check_server(recipe)
    _check_key_names(recipe)
    _check_draft(recipe)
    _check_verify(recipe)
    _check_evaluation_while_training(recipe)
    _check_preference(recipe)
    if recipe.train.lm is not None and recipe.train.lm.weight == 0:
        raise LimbeckError(
            "train.lm.weight is 0, so that its text changes nothing; give a weight above 0, or set train.lm=null"
        )
    student = recipe.student
    if student.init == "pretrained" and student.model is None:
        raise LimbeckError("student.model is missing; name a model, or set student.init=depth_prune to cut the teacher")
    if "recovery" in recipe.evaluate.groups and (student.quantize is None or student.init != "teacher"):
        raise LimbeckError(
            "evaluate.groups.recovery measures what quantising the teacher cost and training brought back; set "
            "student={init: teacher, quantize: {format: q4_0}}, or leave recovery out of evaluate.groups"
        )
    if student.init == "teacher" and (student.model is not None or student.revision is not None):
        named = "model" if student.model is not None else "revision"
        raise LimbeckError(
            f"student.init=teacher begins as a copy of the teacher, but student.{named} names another; remove it, or "
            "set student.init=pretrained"
        )
    if student.init == "depth_prune" and (student.layers is None) == (not student.keep):
        raise LimbeckError("student.init=depth_prune needs student.layers (how many) or student.keep (which), not both")
    if student.init != "depth_prune" and (student.layers is not None or student.keep):
        raise LimbeckError(f"student.layers and student.keep belong to init depth_prune, not to init {student.init}")
    if student.init != "scratch" and student.config:
        raise LimbeckError(f"student.config belongs to init scratch, not to init {student.init}")


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


def _check_evaluation_while_training(recipe: Recipe) -> None:
    train = recipe.train
    if train.early_stopping_patience is not None and train.eval_steps is None:
        raise LimbeckError(
            f"train.early_stopping_patience is {train.early_stopping_patience} measurements, but nothing is measured "
            "while it trains; set train.eval_steps, or remove it"
        )
    if train.early_stopping_threshold and train.early_stopping_patience is None:
        raise LimbeckError(
            f"train.early_stopping_threshold is {train.early_stopping_threshold}, which only "
            "train.early_stopping_patience reads; set that, or remove it"
        )
    written = recipe.sft_on_responses or recipe.responses.source.trains_on_initial
    if recipe.train.eval_steps is not None and not written:
        raise LimbeckError(
            "train.eval_steps measures on training prompts that were answered before training, but with "
            f"responses.source={source_name(recipe.responses.source)} and no sft on them none "
            "are; remove it, or add a section sft"
        )


def _check_preference(recipe: Recipe) -> None:
    preference = recipe.preference
    if preference is None:
        return
    if recipe.student.quantize is not None:
        raise LimbeckError(
            "preference tunes all weights, which would leave the grid of student.quantize; remove one of the two"
        )
    smoothing = preference.label_smoothing
    if smoothing and preference.loss_type not in SMOOTHED:
        raise LimbeckError(
            f"preference.label_smoothing is {smoothing}, which preference.loss_type={preference.loss_type} does not "
            f"read; remove it, or set preference.loss_type={' or '.join(SMOOTHED)}"
        )
    if preference.loss_type == "exo_pair" and not smoothing:
        raise LimbeckError("preference.loss_type=exo_pair needs preference.label_smoothing above 0, such as 0.001")
    if isinstance(preference.pairs, JudgePairs) and preference.pairs.base_url is None:
        raise LimbeckError(
            "preference.pairs is judge, but preference.pairs.base_url is missing; give the address of an "
            "OpenAI-compatible server, such as http://localhost:8000/v1, or set preference.pairs=teacher"
        )


def _check_server(recipe: Recipe) -> None:
    server = recipe.responses.server
    if server is None:
        return
    if recipe.base_author != "teacher":
        raise LimbeckError(
            "responses.server is where the teacher answers, but the responses are those of the data; "
            "remove it, or let the teacher answer (responses.source=teacher)"
        )


def _check_key_names(recipe: Recipe) -> None:
    named: dict[str, object] = {"responses.server": recipe.responses.server}
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


def _check_axes(recipe: Recipe) -> None:
    """Check temperature and support against each other."""
    objective, teacher = recipe.objective, recipe.teacher
    apart = next((s for s in ("teacher_temperature", "student_temperature") if getattr(objective, s) is not None), None)
    for moving in ("temperature_end", "temperature_adapt"):
        if apart is not None and getattr(objective, moving) is not None:
            raise LimbeckError(f"objective.{moving} moves both sides at once; remove objective.{apart}")
    # Only a server that gives no more than these is asked for them while it trains.
    served = isinstance(teacher.where, OnServer) and teacher.where.signal_for(teacher.support) == "topk"
    if recipe.on_policy and teacher.support != "full" and not served:
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


# Of several teachers each has its own; all else of the section is of the signal that they give together.
_OWN = ("model", "revision", "dtype", "attn_implementation", "trust_remote_code", "where", "sees")


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


def _check_source(recipe: Recipe) -> None:
    """Check the response source against the other keys."""
    recipe.responses.source.check(
        max_new_tokens=recipe.responses.max_new_tokens,
        per_device_train_batch_size=recipe.train.per_device_train_batch_size,
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
        _check_untempered(recipe)


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


def _check_untempered(recipe: Recipe) -> None:
    """Check that MiniLLM's objective has temperature 1, at which its two parts are one gradient."""
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
                f"contrast.rule=minillm is the gradient of a divergence at loss temperature 1 alone, but objective."
                f"{key} is {value}: the current token's part would be tempered and the later ones' not; {remedy}"
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
