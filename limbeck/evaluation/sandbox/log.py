"""Verdicts on disk, a line each as it comes: a program that was judged once is not run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from limbeck.evaluation.sandbox.host import Job, Limits, Verdict, run_all
from limbeck.flow import LimbeckError
from limbeck.rundir import fingerprint, naming


def judge_all(jobs: Sequence[Job], limits: Limits, *, log: Path, scratch: Path) -> Iterator[tuple[int, Verdict]]:
    """Verdicts with the numbers of their jobs, every job once, those known from `log` first.

    Equal jobs are run once. A line that a kill cut off is not counted, and its program run again.

    Raises:
        LimbeckError: a line in the middle of the log is damaged, or `run` would raise.
    """
    keys = [fingerprint([asdict(job), asdict(limits)]) for job in jobs]
    known = _read(log)
    for number, key in enumerate(keys):
        if key in known:
            yield number, known[key]
    waiting: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        if key not in known:
            waiting.setdefault(key, []).append(number)
    if not waiting:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    order = list(waiting.items())
    with naming(log), log.open("a", encoding="utf-8") as file:
        for place, verdict in run_all([jobs[numbers[0]] for _, numbers in order], limits, scratch):
            key, numbers = order[place]
            file.write(json.dumps({"job": key} | asdict(verdict)) + "\n")
            file.flush()
            for number in numbers:
                yield number, verdict


def _read(log: Path) -> dict[str, Verdict]:
    if not log.exists():
        return {}
    whole, _, cut = log.read_bytes().rpartition(b"\n")
    if cut:
        # What follows must begin on a line of its own.
        with log.open("r+b") as file:
            file.truncate(len(whole) + (1 if whole else 0))
    known = {}
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            known[fields["job"]] = Verdict(kind=fields["kind"], text=fields["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LimbeckError(
                f"{log}:{number}: got a line that is no verdict ({error}); expected job, kind and text: "
                "delete the file and evaluate again"
            ) from error
    return known
