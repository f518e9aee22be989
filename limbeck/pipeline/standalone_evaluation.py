"""Evaluation on its own: any student beside any teacher on any prompts, without a training run.

It has three stages, and is resumable, locked and addressed by fingerprints like a run: the prompts, all of
them held out; the exam; the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.evaluation.scores.metrics import known_metrics
from limbeck.models.fingerprints import model_fingerprint
from limbeck.models.sources import resolve
from limbeck.models.vocabulary import compare_vocabularies
from limbeck.pipeline.checks import check_template, resolvable
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.pipeline.provisions import check_group_provisions
from limbeck.pipeline.seen_prompts import check_sees
from limbeck.pipeline.several import check_several
from limbeck.pipeline.stages import evaluate, report
from limbeck.pipeline.stages.evaluate import check_groups, evaluation_inputs, examine, write_answers
from limbeck.pipeline.stages.prompts import prompt_inputs, read_prompt_source
from limbeck.pipeline.stages.respond import teacher_inputs
from limbeck.pipeline.text_only import load_student_tokenizer
from limbeck.recipe.load import Recipe, load_recipe
from limbeck.recipe.messages import suggestion
from limbeck.types import Json, LimbeckError


def recipe_of(student: str, teacher: str | None, prompts: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of an evaluation. Without a teacher no group may ask for one.

    Args:
        student, teacher: directories, hub ids, GGUF files or named assets.
        prompts: a file or data set, as `prompts.source`.
        overrides: `section.key=value`; `evaluate.groups` says what is measured, by default fidelity and rouge, without
            a teacher rouge against the references.

    Raises:
        LimbeckError: a group needs a teacher and there is none, or `load_recipe` refuses something.
    """
    named = Path(student).expanduser()
    folder = named.name if named.name != "train" else named.resolve().parent.name
    evaluate: dict[str, Any] = {"groups": ["fidelity", "rouge"]}
    if teacher is None:
        evaluate = {"groups": {"rouge": {"against": ["references"]}}}
    tree = {
        "name": f"evaluation-of-{folder}",
        "teacher": {"model": teacher or student, "where": "in_process" if teacher else "none"},
        "student": {"model": student, "init": "pretrained"},
        "prompts": {"source": prompts},
        "evaluate": evaluate,
    }
    _check_names(overrides)
    recipe = load_recipe(tree, overrides)
    if teacher is None:
        _require_teacher(recipe)
    return recipe


def _check_names(overrides: Sequence[str]) -> None:
    """Refuse names of metrics in the place of groups, with the group that has them."""
    groups = tuple(EVALUATION_GROUPS)
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() not in ("evaluate", "evaluate.groups"):
            continue
        for name in value.strip(" []").replace(",", " ").split():
            # A group may bear the name of its metric.
            if name not in groups and name in known_metrics():
                raise LimbeckError(f"{name} is a metric; name the group that measures it: {', '.join(groups)}")
            if name not in groups:
                raise LimbeckError(f"no group {name!r}; there are {', '.join(groups)}{suggestion(name, groups)}")


def _require_teacher(recipe: Recipe) -> None:
    for name, group in recipe.evaluate.groups.items():
        if "teacher" in group.needs():
            raise LimbeckError(
                f"group {name} needs a teacher and none is given; name one with --teacher, or {group.teacher_remedy}"
            )


def _run_prompts(context: RunContext) -> Json:
    with read_prompt_source(context, heldout_fraction=1.0) as loaded:
        context.console.say(f"prompts: {len(loaded.prompts)}, {loaded.with_completion} with a reference answer")
        return {**loaded.counts(), "unread_columns": dict(loaded.unread)}


def _check_exam(context: RunContext) -> None:
    """Both models exist, and token metrics have the same tokens on both sides."""
    resolvable(context.recipe.student)
    check_template(context, load_student_tokenizer(context))
    for section in context.recipe.every_teacher.values():
        resolvable(context.recipe.source_of(section))
    check_several(context)
    check_template(context, context.teacher.tokenizer)
    check_group_provisions(context)
    check_sees(context)
    if "gap" in context.recipe.evaluate.groups:
        raise LimbeckError(
            "group gap compares the student before and after a training, and an evaluation on its own has no student "
            "before; leave it out of evaluate.groups"
        )
    asking = [name for name, group in context.recipe.evaluate.groups.items() if "tokens" in group.needs()]
    if asking and context.student_card is not None:
        differences = compare_vocabularies(context.teacher_card, context.student_card).differences
        if differences:
            rest = [name for name in context.recipe.evaluate.groups if name not in asking] or ["rouge", "diversity"]
            raise LimbeckError(
                f"group {asking[0]} compares token by token, but teacher and student have different tokens: "
                f"{differences[0]}; what compares texts works: evaluate.groups=[{', '.join(rest)}]"
            )
    check_groups(context)


def _exam_inputs(context: RunContext) -> Json:
    section, prompts = context.recipe.student, context.recipe.prompts
    assert section.model is not None
    source = resolve(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
    student = {"weights": model_fingerprint(source), "dtype": section.dtype, "attention": section.attn_implementation}
    template = {"template": prompts.template, "chat_options": prompts.chat_options, "too_long": prompts.too_long}
    evaluate = evaluation_inputs(context)
    return {"student": student, "teacher": teacher_inputs(context), "prompts": template, "evaluate": evaluate}


def _run_evaluation(context: RunContext) -> Json:
    parts = examine(context, ("after",))
    write_answers(context, parts)
    return {"heldout_prompts": len(RunEvaluation(context=context, part="after").prompts), "alone": True}


STANDALONE_STAGES: tuple[Stage, ...] = (
    Stage(
        name="prompts",
        inputs=lambda context: prompt_inputs(context) | {"heldout": "all"},
        run=_run_prompts,
        outputs=lambda run: (run.prompts, run.problems),
    ),
    Stage(
        name="evaluate",
        check=_check_exam,
        inputs=_exam_inputs,
        run=_run_evaluation,
        outputs=evaluate.STAGE.outputs,
        working=evaluate.STAGE.working,
        helped=evaluate.STAGE.helped,
    ),
    report.STAGE,
)
