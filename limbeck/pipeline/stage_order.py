"""The stages of a run, in order; each goes from what is on disk to what is on disk."""

from limbeck.pipeline.context import Stage
from limbeck.pipeline.stages import evaluate, prefer, prompts, report, respond, teach, train

STAGES: tuple[Stage, ...] = (
    prompts.STAGE,
    respond.STAGE,
    teach.STAGE,
    train.STAGE,
    prefer.STAGE,
    evaluate.STAGE,
    report.STAGE,
)
