"""Stage 7: the page that shows what was kept, and a picture of it for a README."""

from __future__ import annotations

from limbeck.pipeline.context import RunContext, Stage
from limbeck.report import write_picture, write_report
from limbeck.types import Json


def _run_report(context: RunContext) -> Json:
    write_picture(context.run.root, context.run.picture)
    context.console.say(f"report: {write_report(context.run.root)}")
    return {}


STAGE = Stage(
    name="report",
    inputs=lambda context: {},
    run=_run_report,
    outputs=lambda run: (run.report, run.picture),
    # The page shows the run's own name.
    shared=False,
    cheap=True,
)
