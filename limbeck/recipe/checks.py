"""Checks of keys of a recipe that do not go together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from limbeck.recipe.optimizers import OPTIM
from limbeck.recipe.policy_checks import check_policy
from limbeck.recipe.preference import SMOOTHED
from limbeck.recipe.response_checks import check_responses
from limbeck.recipe.response_source import source_name
from limbeck.recipe.sections import AXES, ObjectiveSection, Recipe, StudentSection, TrainSection
from limbeck.recipe.teacher_checks import check_teachers
from limbeck.rollouts.preference.options import JudgePairs
from limbeck.types import LimbeckError


def check(recipe: Recipe) -> None:
    """Check keys that were read one by one against each other.

    Raises:
        LimbeckError: some do not go together; says which to change.
    """
    parts = Path(recipe.name).parts
    if not parts or ".." in parts or Path(recipe.name).is_absolute() or not recipe.name.isprintable():
        raise LimbeckError(f"name: got {recipe.name!r}; expected a plain name, a path belongs in output_dir")
    reserved = sorted({*AXES, "options"} & recipe.objective.options.keys())
    if reserved:
        raise LimbeckError(f"objective.options holds {reserved[0]!r}; write it as objective.{reserved[0]}")
    check_teachers(recipe)
    check_responses(recipe)
    check_policy(recipe)
    _check_evaluation_while_training(recipe)
    _check_preference(recipe)
    if recipe.train.lm is not None and recipe.train.lm.weight == 0:
        raise LimbeckError(
            "train.lm.weight is 0, so that its text changes nothing; give a weight above 0, or set train.lm=null"
        )
    _check_optimizer(recipe)
    _check_unread(recipe)
    _check_student(recipe)


def _check_optimizer(recipe: Recipe) -> None:
    train, default = recipe.train, TrainSection()
    changed = [
        name for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(train, name) != getattr(default, name)
    ]
    if changed and not train.optim.adam:
        raise LimbeckError(
            f"train.{changed[0]} is {getattr(train, changed[0])}, which train.optim={OPTIM.name_of(train.optim)} does "
            "not read; remove it, or set train.optim=adamw_torch_fused"
        )


def _check_unread(recipe: Recipe) -> None:
    """Check for keys that are not read beside others, and would change nothing."""
    train, objective = recipe.train, recipe.objective
    if train.warmup_ratio and train.warmup_steps:
        raise LimbeckError(
            f"train.warmup_ratio is {train.warmup_ratio}, but train.warmup_steps={train.warmup_steps} takes its place; "
            "set one of the two to 0"
        )
    if train.hub_model_id is not None and not train.push_to_hub:
        raise LimbeckError(
            f"train.hub_model_id is {train.hub_model_id!r}, which only train.push_to_hub reads; set that, or remove it"
        )
    if objective.temperature_shape != ObjectiveSection().temperature_shape and objective.temperature_end is None:
        raise LimbeckError(
            f"objective.temperature_shape is {objective.temperature_shape}, which only objective.temperature_end "
            "reads; set that, or remove it"
        )


def _check_student(recipe: Recipe) -> None:
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
    for key, plain in (("revision", None), ("trust_remote_code", False)):
        if student.model is None and getattr(student, key) != plain:
            raise LimbeckError(
                f"student.{key} is {getattr(student, key)!r}, but without student.model the student is made of the "
                f"teacher; set teacher.{key}, or name student.model"
            )
    if student.init == "depth_prune" and (student.layers is None) == (not student.keep):
        raise LimbeckError("student.init=depth_prune needs student.layers (how many) or student.keep (which), not both")
    if not student.pruned and (student.layers is not None or student.keep):
        raise LimbeckError(f"student.layers and student.keep belong to init depth_prune, not to init {student.init}")
    _check_width(student)
    if student.init != "scratch" and student.config:
        raise LimbeckError(f"student.config belongs to init scratch, not to init {student.init}")


def _check_width(student: StudentSection) -> None:
    if student.init != "width_prune":
        if student.width is not None:
            raise LimbeckError(f"student.width belongs to init width_prune, not to init {student.init}")
        return
    if student.width is None or not any(asdict(student.width).values()):
        raise LimbeckError(
            "student.init=width_prune needs student.width with hidden_size, intermediate_size or num_attention_heads"
        )
    if student.layers is not None and student.keep:
        raise LimbeckError("student.init=width_prune reads student.layers (how many) or student.keep (which), not both")


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
