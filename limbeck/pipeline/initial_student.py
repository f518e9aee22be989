"""The student before training: cut out of the teacher, with weights of its own, or with fresh ones."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from limbeck.models.loading import LoadedModel
from limbeck.models.slices import is_unread
from limbeck.models.vision import bind_images
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE
from limbeck.pipeline.checks import student_spec
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.sharing import initial_student, once
from limbeck.pipeline.stages.respond import CALIBRATION_RESPONSES, load_responses
from limbeck.pipeline.student_endings import with_endings
from limbeck.rollouts.collate import collate
from limbeck.rollouts.table import in_a_row
from limbeck.runtime.files import read_json, write_json
from limbeck.runtime.records import read_fields
from limbeck.student.build import PRUNED, Student, StudentSpec, build_student
from limbeck.student.width import read_width
from limbeck.types import Json, LimbeckError


def build_initial_student(context: RunContext, *, unread: bool = False) -> Student:
    """The student before training. What stays of a pruned model is measured once and kept in the run directory.

    Args:
        unread: its weights may stay in their files until it is sharded.
    """
    section, blocks = context.recipe.student, context.run.root / "blocks.json"
    if not blocks.exists() and (before := context.run.blocks_before).exists():
        write_json(blocks, read_json(before))
    # What is cut up is read first.
    unread = unread and section.init != "width_prune"
    if section.measured and not blocks.exists() and not (unread and context.rank):
        with once(context, {"blocks": initial_student(context)}, context.run.root, (blocks.name,)):
            if not blocks.exists():
                student = _build(context, blocks)
                if not unread:
                    return student
                # Measured whole, and read anew like on the other ranks.
                del student
    return _build(context, blocks, unread=unread)


def student_before_teaching(context: RunContext) -> Student:
    """The same student, where the stage before it asks for its choice of tokens."""
    return _build(context, context.run.blocks_before)


def _build(context: RunContext, blocks: Path, *, unread: bool = False) -> Student:
    """The student, and in `blocks` what it has of a larger model, where that was measured."""
    spec = student_spec(context)
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
    )
    if context.recipe.student.measured and not blocks.exists():
        write_json(blocks, _choice(student, spec))
    student = with_endings(context, student)
    if not is_unread(student.model):
        student.model.to(context.device)  # type: ignore[arg-type]
    bind_images(student.model, context.run.images)
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
