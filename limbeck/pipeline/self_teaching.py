"""Students that teach themselves: `teacher.model` as the student's start, the student as it is, or its average.

Before training all three are one model, the student's start: it writes and scores what is there before training, and
the evaluation compares with it before and after. They differ in what the training asks.
"""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.objectives.sums import leaves
from limbeck.pipeline.build import loss_plan_of
from limbeck.pipeline.context import RunContext
from limbeck.recipe.sections import Recipe
from limbeck.student.build import Student
from limbeck.teachers.base import Teacher
from limbeck.teachers.of_student import MovingAverage, OfStudent, base_under_adapters
from limbeck.teachers.sees import StudentsPrompt
from limbeck.types import Json, LimbeckError


@dataclass(frozen=True, kw_only=True)
class TrainingTeacher:
    """The teacher that a training asks.

    Attributes:
        average: what moves with the student, where the teacher is that.
    """

    teacher: Teacher
    average: MovingAverage | None = None


def training_teacher(context: RunContext, student: Student) -> TrainingTeacher:
    """The teacher of a training: that of the run, or one made of the student that is about to be trained."""
    name, average = context.recipe.teacher.model, None
    if name == "live":
        network = student.model
    elif name == "ema":
        average = MovingAverage.of(student.model, context.recipe.teacher.decay)
        network = average.network
    elif under_adapters(context.recipe):
        network = base_under_adapters(student.model)
        context.console.say("train: the teacher is the base under the student's adapters, without a second copy")
    else:
        return TrainingTeacher(teacher=context.teacher)
    teacher = OfStudent.of(context.run_teacher, network)
    return TrainingTeacher(teacher=teacher if context.seen is None else context.seen.teacher(teacher), average=average)


def under_adapters(recipe: Recipe) -> bool:
    """Whether a training finds the weights of its teacher `base` under the adapters of the student."""
    teacher, student = recipe.teacher, recipe.student
    same = (teacher.dtype, teacher.attn_implementation) == (student.dtype, student.attn_implementation)
    return teacher.model == "base" and student.lora is not None and student.quantize is None and same


def self_teaching_inputs(context: RunContext) -> Json:
    """What the training asks of the student itself, for fingerprints; nothing where the weights say it all."""
    section = context.recipe.teacher
    if section.model == "ema":
        return {"teacher": {"ema": section.decay}}
    return {"teacher": "live"} if section.model == "live" else {}


def check_self_teaching(context: RunContext) -> None:
    """Check that a student can learn from itself.

    Raises:
        LimbeckError: teacher and student begin as one and nothing ever moves them apart.
    """
    recipe = context.recipe
    if recipe.teacher.model not in ("base", "ema") or not isinstance(recipe.teacher.sees, StudentsPrompt):
        return
    objective, lora = recipe.objective, recipe.student.lora
    labels = any("labels" in part.reads for one in loss_plan_of(recipe).objectives for _, part in leaves(one))
    apart = objective.teacher_temperature != objective.student_temperature
    other = recipe.student.quantize or recipe.sft or recipe.train.lm or (lora is not None and lora.lora_dropout)
    if not (labels or apart or other):
        raise LimbeckError(
            f"teacher.model={recipe.teacher.model} begins as the student does, and with teacher.sees=prompt their "
            f"distributions are one, so that the gradient of objective {objective.name} is zero in every step; "
            "set teacher.sees to more than the student sees, such as column or system, or name another teacher"
        )
