"""The student before training: cut out of the teacher, with weights of its own, or with fresh ones."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from limbeck.models.heads import causal_model
from limbeck.models.loading import LoadedModel, source_config
from limbeck.models.slices import is_converted, is_unread
from limbeck.models.sources import resolve
from limbeck.models.vision import bind_images
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.pipeline.checks import student_spec
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.sharing import initial_student, once, stages_before
from limbeck.pipeline.stages.respond import CALIBRATION_RESPONSES, load_responses
from limbeck.pipeline.student_endings import with_endings
from limbeck.rollouts.collate import collate
from limbeck.rollouts.table import in_a_row
from limbeck.runtime.files import read_json, write_json
from limbeck.runtime.memory import give_back_freed
from limbeck.runtime.records import fingerprint, read_fields
from limbeck.student.build import PRUNED, Student, StudentSpec, build_student
from limbeck.student.quantizing import quantization_in
from limbeck.student.saving import save_student
from limbeck.student.width import read_width
from limbeck.types import Json, LimbeckError


def build_initial_student(context: RunContext, *, unread: bool = False, take: bool = False) -> Student:
    """The student before training. What stays of a pruned model is measured once and kept in the run directory.

    Args:
        unread: its weights may stay in files until it is sharded: those it comes from, or those that the first rank
            writes where the former do not hold it as it begins.
        take: what stays of a teacher in memory becomes the student's, and the teacher is let go of: no other use of it
            sees what the training changes.
    """
    blocks = context.run.root / "blocks.json"
    if not blocks.exists() and (before := context.run.blocks_before).exists():
        write_json(blocks, read_json(before))
    if unread and is_written_first(context):
        return _ready(context, _of_files(context, _written(context, blocks)))
    if not (unread and context.rank):
        student = _measured(context, blocks, take=take)
        if student is not None and not unread:
            return _ready(context, student)
        # Measured whole, and read anew like on the other ranks.
        del student
    return _ready(context, _build(context, blocks, unread=unread, take=take))


def student_before_teaching(context: RunContext) -> Student:
    """The same student, where the stage before it asks for its choice of tokens."""
    return _ready(context, _build(context, context.run.blocks_before))


def is_written_first(context: RunContext) -> bool:
    """Whether no files hold a student as it begins, tensor by tensor, so that the first rank writes such for all.

    It is drawn, narrowed or rounded, comes from a GGUF file, reads images, or transformers makes other tensors of those
    in its files.
    """
    section = context.recipe.student
    if context.student_trusted:
        return False
    if section.quantize is not None:
        return True
    card = context.student_card or context.teacher_card
    if section.init in ("scratch", "width_prune") or card.image_token is not None:
        return True
    name = section.model or context.recipe.teacher.model
    if name is None:
        return False
    source = resolve(name, revision=section.revision, weights=False)
    return source.gguf is not None or is_converted(source_config(source))


def _written(context: RunContext, blocks: Path) -> Path:
    """The folder of the student before training, without adapters, which the first rank writes unless it is there."""
    run = context.run
    made_from = fingerprint({"stages": stages_before(context), **initial_student(context)})

    def is_there() -> bool:
        record = run.start / "made_from.json"
        return record.exists() and read_json(record) == made_from

    if context.rank:
        context.wait_until(is_there)
    elif not is_there():
        student = _measured(context, blocks, plain=True) or _build(context, blocks, plain=True)
        save_student(student.model, student.tokenizer, run.start, quantization=student.quantization, for_slices=True)
        write_json(run.start / "made_from.json", made_from)
        del student
        context.teacher.release()
        give_back_freed()
    return run.start


def _of_files(context: RunContext, folder: Path) -> Student:
    """The student whose weights before training, without adapters, are in a folder and stay there for now."""
    spec = replace(
        student_spec(context), init="pretrained", model=str(folder), revision=None, layers=None, keep=(), width=None,
        stays=None, config={}, quantize=None,
    )  # fmt: skip
    student = build_student(spec, teacher_parameters=context.teacher.size, unread=True)
    if context.recipe.student.quantize is None:
        return student
    return replace(student, quantization=quantization_in(folder, causal_model(student.model)))


def _measured(context: RunContext, blocks: Path, *, plain: bool = False, take: bool = False) -> Student | None:
    """The whole student where measuring what stays of it has just built it; None where `blocks` are there already."""
    if not context.recipe.student.measured or blocks.exists():
        return None
    with once(context, {"blocks": initial_student(context)}, context.run.root, (blocks.name,)):
        return None if blocks.exists() else _build(context, blocks, plain=plain, take=take)


def _ready(context: RunContext, student: Student) -> Student:
    """The student as it is trained: it ends its answers where the teacher does, and is where it computes."""
    student = with_endings(context, student)
    if not is_unread(student.model):
        student.model.to(context.device)  # type: ignore[arg-type]
    bind_images(student.model, context.run.images)
    return student


def _build(
    context: RunContext, blocks: Path, *, unread: bool = False, plain: bool = False, take: bool = False
) -> Student:
    """The student, and in `blocks` what it has of a larger model, where that was measured.

    Args:
        plain: without adapters.
        take: have what stays of the teacher, which is let go of.
    """
    spec = student_spec(context)
    if plain:
        # Adapters that are new change nothing; weights in few bits are refused without any.
        lora = spec.lora if spec.quantize is not None else None
        spec = replace(spec, lora=lora, gradient_checkpointing=False)
    if context.rank and context.recipe.student.measured:
        # One rank measures for all: what two machines measure may differ in the last bit and in a block.
        context.wait_until(blocks.exists)
    if blocks.exists():
        found = measured_blocks(blocks)
        spec = replace(spec, keep=tuple(found["keep"]), layers=None, stays=read_width(found.get("width"), blocks))
    spec, weights = _of_teacher(context, spec, unread=unread)
    responses = in_a_row(load_responses(context, "train"))[:CALIBRATION_RESPONSES]
    # A few at a time: what is measured on them is a sum, and a batch of all takes a gigabyte.
    rows = range(len(responses))
    calibration = [
        collate(responses, rows[first : first + SCORING_BATCH_SIZE], pad_id=0) for first in rows[::SCORING_BATCH_SIZE]
    ]
    student = build_student(
        spec,
        teacher=weights,
        teacher_parameters=context.teacher.size,
        calibration=calibration,
        progress=context.console.say,
        unread=unread,
        take=take,
    )
    if take:
        del weights
        context.teacher.release()
    if context.recipe.student.measured and not blocks.exists():
        write_json(blocks, _choice(student, spec))
    return student


def _choice(student: Student, spec: StudentSpec) -> Json:
    """Which blocks stay, and what stays of each where they are narrowed."""
    given = {"keep": spec.keep, "removed": (), "influence": (), "path": (), "criterion": "given"}
    blocks = given if student.blocks is None else asdict(student.blocks)
    return blocks | ({} if student.width is None else {"width": asdict(student.width)})


def _of_teacher(context: RunContext, spec: StudentSpec, *, unread: bool) -> tuple[StudentSpec, LoadedModel | None]:
    """The spec of a student, and the teacher's weights where it is cut out of them in the precision they have.

    A student that begins otherwise, or may stay in its files, loads its own, or none: then it names the teacher, which
    is let go of first.
    """
    teacher = context.recipe.teacher
    same = spec.dtype == teacher.dtype and teacher.bits is None
    if spec.model is None and spec.init in PRUNED and same and not (unread and spec.init == "depth_prune"):
        return spec, context.teacher.weights()
    context.teacher.release()
    return spec if spec.model is not None else replace(spec, model=teacher.model, revision=teacher.revision), None


def measured_blocks(blocks: Path) -> Json:
    """The block scores of the teacher, and what stays of each width where it is narrowed."""
    kinds = {"keep": list, "removed": list, "influence": list, "path": list, "criterion": str}
    found = read_fields(blocks, kinds)
    numbers = (*found["keep"], *found["removed"])
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise LimbeckError(
            f"{blocks} is damaged (keep is {found['keep']!r:.60}, expected numbers of blocks); delete it and run the "
            "same command again"
        )
    return found
