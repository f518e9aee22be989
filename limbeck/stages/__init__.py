"""The six stages of the story, in order; each goes from what is on disk to what is on disk."""

from limbeck.stages import evaluation, prompts, report, responses, signal, student
from limbeck.story import Stage

STAGES: tuple[Stage, ...] = (
    prompts.STAGE,
    responses.STAGE,
    signal.STAGE,
    student.STAGE,
    evaluation.STAGE,
    report.STAGE,
)
