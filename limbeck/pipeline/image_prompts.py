"""Prompts with images in a run: their digest, their lengths in both models, and what does not read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from limbeck.models.image_features import ImageReader
from limbeck.models.images import ImageFolder
from limbeck.models.loading import source_config, source_tokenizer
from limbeck.models.processors import placeholder_of, source_processor
from limbeck.models.sources import resolve
from limbeck.models.vision import bind_images, see_first
from limbeck.pipeline.checks import student_spec
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.student_endings import same_tokens
from limbeck.prompts.columns import ColumnTally
from limbeck.prompts.images import images_digest
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.readers import rows_of
from limbeck.recipe.sections import PromptsSection
from limbeck.recipe.teacher import TeacherSection
from limbeck.student.build import build_student
from limbeck.types import LimbeckError, Prompt, TokenPrompt


def reads_images(context: RunContext) -> bool:
    """Whether both models read images. Prompts can be read without the models; one that is not there reads none."""
    try:
        return context.reads_images
    except LimbeckError:
        return False


def digest_of_images(section: PromptsSection, ignored: Sequence[str], seen: Sequence[str] = ()) -> str | None:
    """A hash of the images that a source names, so that an edited one makes a new run; None where there are none.

    Raises:
        LimbeckError: one cannot be read; names its row.
    """
    columns = ColumnTally(ignore=ignored, images=True, seen=seen)
    rows = rows_of(section.source, section.dataset_split, section.dataset_config)
    return images_digest((columns.kept(placed), placed) for placed in rows)


def check_image_methods(context: RunContext, prompts: Sequence[Prompt]) -> None:
    """See that everything a recipe asks for reads the images of its prompts.

    Raises:
        LimbeckError: something reads text alone; names the key to change.
    """
    first = next((prompt for prompt in prompts if prompt.images), None)
    if first is None:
        return
    for what, remedy in _blind(context):
        raise LimbeckError(f"prompt {prompt_label(first)} has images, which {what} does not read; {remedy}")


def _blind(context: RunContext) -> Iterator[tuple[str, str]]:
    """What does not read images, and what to do instead."""
    recipe = context.recipe
    if recipe.responses.server is not None:
        yield "a server that answers (responses.server)", "leave it out: the teacher answers in this process"
    if recipe.responses.engine.elsewhere:
        yield "an engine that writes for the student (responses.engine)", "leave it out"
    if recipe.responses.draft is not None:
        yield "a draft (responses.draft)", "leave it out"
    if getattr(recipe.responses.source, "by_teacher", False):
        yield "a sampler of both models (responses.source)", "set responses.source to teacher, data, student or pairs"
    if recipe.student.pruned:
        how = f"the pruning of {'blocks' if recipe.student.init == 'depth_prune' else 'widths'}"
        yield f"{how} (student.init={recipe.student.init})", "name a student.model, or set student.init=scratch"
    if recipe.student.quantize is not None:
        yield "the training of quantised weights (student.quantize)", "leave it out"
    if "judge" in recipe.evaluate.groups:
        yield "a judge (evaluate.groups.judge)", "leave it out of evaluate.groups"
    if not same_tokens(context):
        yield "a pair with different tokens", "choose a pair of one model family"
    teacher, student = context.teacher_card, context.student_card
    if student is not None and student.image_token != teacher.image_token:
        yield (
            f"a pair of two families (the teacher {teacher.name} writes {teacher.image_token} for one, the student "
            f"{student.name} {student.image_token})",
            "choose a student of the teacher's family",
        )


def expanded_lengths(context: RunContext, prompts: Sequence[TokenPrompt]) -> dict[str, int]:
    """Tokens of prompts by id, in whichever of the two models an image takes more of them.

    Raises:
        LimbeckError: a processor refuses an image; names its row.
    """
    if not any(prompt.images for prompt in prompts):
        return {}
    recipe, readers = context.recipe, []
    for section in (recipe.teacher_source, *([recipe.student] if recipe.student.model is not None else [])):
        readers.append(_reader(context, section))
    return {
        prompt.id: max(
            len(reader.expand(prompt.ids, prompt.images, where=f"prompt {prompt.label or prompt.id}").ids)
            for reader in readers
        )
        for prompt in prompts
    }


def check_student_sees(context: RunContext, prompts: Iterable[Prompt]) -> None:
    """See that the student reads the first image of its prompts, before anybody answers them; it is not kept.

    Raises:
        LimbeckError: it and its processor do not belong together, or the processor refuses the image.
    """
    if not any(prompt.images for prompt in prompts) or (spec := student_spec(context)).model is None:
        return
    student = build_student(spec, progress=context.console.say)
    student.model.to(context.device)
    bind_images(student.model, context.run.images)
    check_sees_first(student.model, prompts)


def check_sees_first(model: Any, prompts: Iterable[Prompt]) -> None:
    """See that a model reads the first image of some prompts.

    Raises:
        LimbeckError: as `check_student_sees`.
    """
    if (first := next((prompt for prompt in prompts if prompt.images), None)) is not None:
        see_first(model, first.images[0], f"prompt {prompt_label(first)}: image 1 ({first.images[0]})")


def _reader(context: RunContext, section: Any) -> ImageReader:
    """How a model of the run expands images; its weights are not needed for that."""
    trusted = section.trust_remote_code if isinstance(section, TeacherSection) else context.student_trusted
    source = resolve(section.model, revision=section.revision, weights=False, trust_remote_code=trusted)
    config = source_config(source, trust_remote_code=trusted)
    tokenizer = source_tokenizer(source, trust_remote_code=trusted)
    placeholder = placeholder_of(tokenizer)
    assert placeholder is not None, "the prompts were read for models that read images"
    return ImageReader(
        processor=source_processor(source, config, tokenizer),
        placeholder=placeholder,
        files=source.directory,
        folder=ImageFolder(context.run.images),
    )
