"""What is said while a round is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from limbeck.pipeline import response_sources
from limbeck.pipeline.response_sources import REPORTED_EVERY_S, _Samplers


def test_a_round_is_reported_now_and_then_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [100.0], []
    monkeypatch.setattr(response_sources.time, "monotonic", lambda: clock[0])
    context: Any = SimpleNamespace(console=SimpleNamespace(say=lines.append))
    student: Any = SimpleNamespace(tokenizer=None, model=None)
    report = _Samplers(context, student, None).reporter()  # type: ignore[arg-type]
    for done in (10, 20, 30):
        report("student", done, 50)
        report("teacher", done, 50)
        clock[0] += 0.4 * REPORTED_EVERY_S
    clock[0] += 0.4 * REPORTED_EVERY_S
    report("student", 40, 50)
    report("student", 50, 50)
    assert lines == [
        "write: student, 10 of 50 answers",
        "write: teacher, 10 of 50 answers",
        "write: student, 40 of 50 answers",
        "write: student, 50 of 50 answers",
    ]
