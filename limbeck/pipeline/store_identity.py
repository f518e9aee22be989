"""The identity of a store of a run's teacher: its manifest, its codecs and what all of its signals have in common."""

from __future__ import annotations

from limbeck.models.fingerprints import tokenizer_fingerprint
from limbeck.pipeline.build import sparse_form
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.sharing import choice_inputs
from limbeck.pipeline.text_only import load_student_tokenizer
from limbeck.recipe.load import Recipe, signal_temperatures
from limbeck.runtime.records import fingerprint
from limbeck.teachers.base import Teacher
from limbeck.teachers.store.base import Codec, Frame
from limbeck.teachers.store.dense import Hidden
from limbeck.teachers.store.manifest import Manifest, TeacherIdentity
from limbeck.teachers.store.sparse import WHOLE, Sampled, TopK


def exact_codec(recipe: Recipe) -> Codec:
    """The codec for the signals of one run: what its support asks for, bit for bit."""
    form = sparse_form(recipe)
    if form is None:
        return Hidden(dtype=recipe.teacher.kept_dtype)
    if form.support == "sampled":
        return Sampled(draws=form.k, bits=WHOLE)
    return TopK(k=recipe.teacher.kept, bits=WHOLE)


def frame_of(context: RunContext, teacher: Teacher | None = None) -> Frame:
    """What all signals of a recipe's teacher have in common, known without weights.

    Args:
        teacher: one of several; None takes that of the run.
    """
    return Frame(
        vocab_size=context.teacher_card.vocab_size,
        width=(teacher or context.teacher.scorer).state_width,
        temperatures=signal_temperatures(context.recipe),
    )


def heldout_codec(context: RunContext, codec: Codec) -> Codec:
    """The codec of held-out texts, of which evaluation reads the whole vocabulary where the teacher says that much."""
    if isinstance(codec, Hidden) or "hidden" not in context.teacher.provides:
        return codec
    return Hidden(dtype=context.recipe.teacher.kept_dtype)


def manifest_of(context: RunContext, codec: Codec, teacher: Teacher | None = None) -> Manifest:
    """The identity of a store of a recipe's teacher; the stage respond is done.

    Args:
        teacher: one of several; None takes that of the run.
    """
    # What it sees is in the addresses: they are those of the texts that it reads.
    teacher, recipe = teacher or context.teacher.scorer, context.recipe
    template = {"name": (context.run.manifest("respond") or {}).get("template")}
    template |= {"chat_options": dict(recipe.prompts.chat_options)} if recipe.prompts.chat_options else {}
    if recipe.teacher.across is not None:
        # Its states are at the positions of other tokens.
        template["tokens_of"] = tokenizer_fingerprint(load_student_tokenizer(context))
    if choice := choice_inputs(context):
        # What another student chose is another store.
        template["students_tokens"] = fingerprint(choice)[:16]
    return Manifest(
        teacher=TeacherIdentity(
            name=teacher.model.model,
            fingerprint=teacher.fingerprint,
            configuration=teacher.configuration_hash,
            dtype=teacher.model.dtype,
            attention=teacher.model.attn_implementation,
            weight_bytes=teacher.bytes_on_disk or 0,
        ),
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
        template=template,
        frame=frame_of(context, teacher),
        codec=codec,
        heldout=heldout_codec(context, codec),
    )
