"""Capturing a recipe's teacher signals into a store that many runs share."""

from __future__ import annotations

from pathlib import Path

from limbeck.pipeline.build import sparse_form
from limbeck.pipeline.capturing import Captured, capture_into
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.sampling import sampling_of
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.store_identity import frame_of, manifest_of
from limbeck.pipeline.students_choice import capture_with_choice
from limbeck.recipe.load import Recipe
from limbeck.runtime.console import Console
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.codecs import codec_text
from limbeck.teachers.store.dense import Hidden
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.teachers.store.teacher import sampling_tree
from limbeck.teachers.store.writer import writing
from limbeck.types import Json, LimbeckError


def codec_of(recipe: Recipe) -> Codec:
    """The codec for a recipe that names none: what its support asks for, with log-probabilities in few bits."""
    form = sparse_form(recipe)
    if form is None:
        return Hidden(dtype=recipe.teacher.kept_dtype)
    return Sampled(draws=form.k) if form.support == "sampled" else TopK(k=recipe.teacher.kept)


def capture(recipe: Recipe, path: Path, codec: Codec | None, *, console: Console, update: bool = False) -> Captured:
    """Score all responses of a recipe with its teacher into a store; what it holds already is not scored again.

    Raises:
        LimbeckError: the store is another teacher's, another process writes to it, or the teacher cannot score.
    """
    context = RunContext(recipe, console)
    if recipe.combine is not None:
        raise LimbeckError(
            f"a store holds the signals of one teacher, but the recipe has {len(recipe.teachers)}; capture each with a "
            "recipe of its own (teacher.model), and name the stores in teachers"
        )
    codec = codec or codec_of(recipe)
    if "hidden" not in context.teacher.provides:
        if "topk" not in context.teacher.provides:
            raise context.teacher.lacks("hidden")
        _require_likeliest(recipe, codec)
        context.teacher.reach()
    if recipe.teacher.student_k and (not isinstance(codec, TopK) or codec.k != recipe.teacher.kept):
        raise LimbeckError(
            f"teacher.student_k={recipe.teacher.student_k} and teacher.support_k={recipe.teacher.support_k} keep "
            f"{recipe.teacher.kept} tokens, but the codec is {codec_text(codec)}; choose --codec "
            f"'{{name: topk, k: {recipe.teacher.kept}}}', or leave teacher.student_k out"
        )
    codec.check(frame_of(context))
    run_pipeline(recipe, stages=STAGES, until="respond", console=console, update=update)
    responses = [*load_responses(context, "train").values(), *load_responses(context, "heldout").values()]
    with writing(path, manifest_of(context, codec), say=console.warn) as writer:
        tokens = sum(response.tokens for response in responses)
        with console.meter("capture", tokens, "tokens") as meter:
            teacher, kept = context.teacher, kept_sampling(recipe)
            if recipe.teacher.student_k:
                return capture_with_choice(context, writer, responses, sampling=kept, advance=meter.advance)
            return capture_into(writer, teacher, responses, reads=teacher.reads, sampling=kept, advance=meter.advance)


def _require_likeliest(recipe: Recipe, codec: Codec) -> None:
    """Refuse a codec that keeps more than the likeliest tokens, of a teacher that says no more."""
    if not isinstance(codec, TopK) or codec.k != recipe.teacher.kept:
        raise LimbeckError(
            f"teacher {recipe.teacher.model} says {recipe.teacher.kept} tokens of each position "
            f"(teacher.support_k) and no more, but the codec is {codec_text(codec)}; choose --codec "
            f"'{{name: topk, k: {recipe.teacher.kept}}}'"
        )


def kept_sampling(recipe: Recipe) -> Json | None:
    """How the answers that are kept beside their signals were written; None where they are not the teacher's alone."""
    section = recipe.responses
    alone = recipe.base_author == "teacher" and section.verify is None and section.draft is None
    return sampling_tree(sampling_of(section)) if alone else None
