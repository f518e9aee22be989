"""End tokens of a run's student: checked before the first stage, set when it is built, and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from limbeck.models.loading import load_tokenizer
from limbeck.models.sources import resolve
from limbeck.models.untrained_tokens import untrained_tokens
from limbeck.models.vocabulary import VocabularyCard, compare_vocabularies
from limbeck.pipeline.context import RunContext
from limbeck.prompts.documents import RAW_TEXT
from limbeck.prompts.templates import TemplateName, end_token_ids, resolve_template
from limbeck.recipe.load import load_recipe
from limbeck.student.build import Student
from limbeck.student.endings import AnswerFormat, answer_ends, answer_format, end_answers_with, stop_ids
from limbeck.types import Json, LimbeckError


def same_tokens(context: RunContext) -> bool:
    """Whether the student reads and writes the teacher's ids, so that it can be given the teacher's tokenizer."""
    return (
        context.student_card is None or not compare_vocabularies(context.teacher_card, context.student_card).differences
    )


def check_endings(context: RunContext) -> None:
    """Check that the student can learn to end an answer.

    Raises:
        LimbeckError: it cannot, since the row of its head that says so is neither trained nor will be.
    """
    if context.student_card is not None and same_tokens(context):
        for line in end_warnings(context, foreseen_format(context), context.student_card):
            context.console.warn(line)


def end_warnings(context: RunContext, format: AnswerFormat, card: VocabularyCard) -> list[str]:
    """Reasons why a student with its own weights may not learn to end an answer, one sentence each.

    Raises:
        LimbeckError: it cannot learn it.
    """
    teacher, section = context.recipe.teacher, context.recipe.student
    if not format.end_ids:
        return [
            f"{teacher.model} has no end-of-sequence token, so nothing ends an answer and the student learns no end; "
            "set eos_token in its tokenizer"
        ]
    if section.init == "scratch" or not (untrained := _untrained_ends(context, format, card)):
        return []
    said = f"{section.model} was never trained on {' or '.join(untrained)}, which ends an answer of the teacher"
    if section.lora is not None or section.freeze_embeddings:
        frozen = "student.lora" if section.lora is not None else "student.freeze_embeddings"
        raise LimbeckError(
            f"{said}, and {frozen} leaves its row of the head as it is, so that hardly an answer would end; leave "
            f"{frozen} out, or choose a student that knows the token"
        )
    return [f"{said}; it has to learn it from nothing: see that answers end within responses.max_new_tokens"]


def _untrained_ends(context: RunContext, format: AnswerFormat, card: VocabularyCard) -> tuple[str, ...]:
    """The end token of training answers, where the student was never trained on it."""
    section = context.recipe.student
    assert section.model is not None
    source = resolve(
        section.model, revision=section.revision, weights=False, trust_remote_code=section.trust_remote_code
    )
    first = dict(zip(format.end_ids[:1], format.ends[:1], strict=True))
    return untrained_tokens(source, first, card.control, card.vocab_size)


def doctor_says(teacher: VocabularyCard, student: VocabularyCard, tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Changes that a run makes to the student, and reasons why it may not learn to end, one sentence each.

    Args:
        tree: sections `teacher` and `student` of a recipe.
    """
    context = RunContext(load_recipe({"name": "doctor", **tree}))
    context.teacher_card, context.student_card = teacher, student
    if not same_tokens(context):
        return ()
    try:
        found = foreseen_format(context)
        warned = end_warnings(context, found, student)
    except LimbeckError as error:
        return (str(error),)
    if not found.changed:
        return tuple(warned)
    return (f"the student is trained and saved with the teacher's tokenizer: {'; '.join(found.changed)}", *warned)


def foreseen_format(context: RunContext) -> AnswerFormat:
    """Format that the student will be trained and saved with, as far as the recipe decides it without the prompts.

    Raises:
        LimbeckError: a chat template that refuses or drops an assistant's text.
    """
    student, prompts = context.recipe.student, context.recipe.prompts
    given = context.teacher.tokenizer
    own = given
    if student.model is not None:
        own = load_tokenizer(student.model, revision=student.revision, trust_remote_code=student.trust_remote_code)
    template = resolve_template(prompts.template, given, RAW_TEXT if context.recipe.documents else ())
    return answer_format(given, template, prompts.chat_options, own=own, window=_window(context))


def with_endings(context: RunContext, student: Student) -> Student:
    """The student with the tokenizer that made the responses, ending its answers where they end."""
    if not same_tokens(context):
        return student
    template = (context.run.manifest("respond") or {})["template"]
    options = context.recipe.prompts.chat_options
    found = answer_format(context.teacher.tokenizer, template, options, own=student.tokenizer, window=_window(context))
    end_answers_with(student.model, found, also=stop_ids(context.teacher.skeleton))
    return replace(student, tokenizer=found.tokenizer, answers=found)


def further_ends(context: RunContext) -> tuple[int, ...]:
    """The tokens that end the teacher's answers beside those that tokenizer and chat template say.

    Variables of the template are checked later; they do not change its end of turn.
    """
    choice, tokenizer, skeleton = context.recipe.prompts.template, context.teacher.tokenizer, context.teacher.skeleton
    if set(answer_ends(skeleton, tokenizer, "plain")) <= {tokenizer.eos_token_id}:
        return ()
    chats = choice == "chat" or (choice == "auto" and isinstance(tokenizer.chat_template, str))
    template: TemplateName = "chat" if chats else "plain"
    return answer_ends(skeleton, tokenizer, template)[len(end_token_ids(tokenizer, template)) :]


def _window(context: RunContext) -> int | None:
    """The most tokens that the student can read."""
    card = context.student_card or context.teacher_card
    return context.recipe.student.config.get("max_position_embeddings", card.context_length)


def say_endings(context: RunContext, student: Student) -> None:
    """Say what changes in a student that has its own tokenizer."""
    if student.answers is not None and student.answers.changed:
        context.console.say(f"student: as the teacher has it, {'; '.join(student.answers.changed)}")


def endings_record(context: RunContext, student: Student) -> Json:
    """The record for student.json and the model card."""
    if student.answers is None:
        return {}
    found = student.answers
    options = context.recipe.prompts.chat_options
    return {
        "template": found.template,
        "ends": list(found.ends),
        "changed": list(found.changed),
    } | ({"chat_options": dict(options)} if options else {})
