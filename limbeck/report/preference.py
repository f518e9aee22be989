"""Preference tuning in the report: what the pairs were, what was left out of them, and which student is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.report.format import setting
from limbeck.report.read_run import Run, number, value_at
from limbeck.rollouts.preference.pairs import in_words

_BY = {"teacher": "the teacher", "judge": "a judge", "data": "the data"}


def preference_account(run: Run) -> list[str]:
    """A sentence each for the pairs, the tuning and the students that are compared; none without preference tuning."""
    record = run.record("prefer")
    pairs, prompts, steps = (number(record, key) for key in ("pairs", "prompts", "steps"))
    if pairs is None or prompts is None or steps is None:
        return []
    source = "rows" if record.get("pairs_by") == "data" else "training prompts"
    said = f"{pairs:,.0f} pairs of answers from {prompts:,.0f} {source}, preferred by {_by(record)}"
    left_out = record.get("left_out")
    if isinstance(left_out, Mapping) and (out := in_words(left_out)):
        said += f"; left out: {out}"
    kind, beta = value_at(run.recipe, "preference.loss_type"), number(run.recipe, "preference.beta")
    rate = number(run.recipe, "preference.learning_rate")
    how = [str(kind)] * bool(kind)
    how += [f"beta {setting(beta)}"] * (beta is not None)
    how += [f"learning rate {setting(rate)}"] * (rate is not None)
    return [
        said,
        f"{steps:,.0f} steps of DPO ({', '.join(how)}) with the distilled student as policy and reference",
        "after training means after preference tuning; the student that distillation left is in student/, the tuned "
        "one in preferred/",
    ]


def _by(record: Mapping[str, Any]) -> str:
    name = str(record.get("pairs_by"))
    return _BY.get(name, name)
