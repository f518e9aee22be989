"""Verdicts on disk, one line each: a program that was tested once is not run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast, get_args

from limbeck.evaluation.sandbox.host import Job, Limits, OutcomeKind, ProgramOutcome, files_possible, run_programs
from limbeck.runtime.append_log import append_to_log, damaged, read_log
from limbeck.runtime.records import fingerprint


def verdicts_of(
    jobs: Sequence[Job], limits: Limits, *, log: Path, scratch: Path
) -> Iterator[tuple[int, ProgramOutcome]]:
    """Verdicts with the numbers of their jobs, every job once, those known from `log` first.

    Equal jobs are run once. A line that a kill cut off is not counted, and its program run again.

    Raises:
        LimbeckError: a line of the log is damaged, or `run` would raise.
    """
    # Where no program may write, one that needs to fails: that verdict holds nowhere else.
    where = [] if files_possible() else ["no files"]
    keys = [fingerprint([asdict(job), asdict(limits), *where]) for job in jobs]
    known = _known(log)
    for number, key in enumerate(keys):
        if key in known:
            yield number, known[key]
    waiting: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        if key not in known:
            waiting.setdefault(key, []).append(number)
    if not waiting:
        return
    order = list(waiting.items())
    for place, verdict in run_programs([jobs[numbers[0]] for _, numbers in order], limits, scratch):
        key, numbers = order[place]
        append_to_log(log, {"job": key} | asdict(verdict))
        for number in numbers:
            yield number, verdict


def _known(log: Path) -> dict[str, ProgramOutcome]:
    known = {}
    for number, entry in read_log(log):
        try:
            job, kind, text = entry["job"], entry["kind"], entry["text"]
        except KeyError as error:
            raise damaged(log, number, error) from None
        if not (isinstance(job, str) and isinstance(kind, str) and isinstance(text, str)) or kind not in get_args(
            OutcomeKind
        ):
            raise damaged(log, number, TypeError("no verdict"))
        known[job] = ProgramOutcome(kind=cast(OutcomeKind, kind), text=text)
    return known
