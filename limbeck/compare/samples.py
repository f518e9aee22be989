"""The same held-out prompts, answered by the teacher and the arms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from limbeck.compare.runs import ComparedArm
from limbeck.report.read_run import number, response_id

MOST_PROMPTS, MOST_ARMS = 5, 6
# Longer answers are cut: what an arm is like shows in the beginning.
MOST_LETTERS = 700


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to a prompt.

    Attributes:
        who: the teacher, or the name of an arm.
        rouge: ROUGE-L against the teacher's answer.
        tone: number of the arm's colour.
        id: `Response.id`, where the run has it.
    """

    who: str
    text: str
    rouge: float | None
    tone: int | None
    id: str | None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with its answers, the teacher's first."""

    prompt: str
    answers: tuple[Answer, ...]


def samples(arms: Sequence[ComparedArm], tones: Mapping[str, int]) -> list[Sample]:
    """The prompts that most arms answered, with answers of the first run of each of the first few arms.

    Prompts are the same by their id, and by their text in runs that have no ids.
    """
    answered: dict[str, dict[str, Mapping[str, Any]]] = {}
    for arm in arms:
        rows = next((m.run.samples for m in arm.done if m.run is not None and m.run.samples), ())
        by_prompt = {
            str(row.get("prompt_id", row["prompt"])): row
            for row in rows
            if isinstance(row.get("prompt"), str) and row.get("after") is not None
        }
        if by_prompt:
            answered[arm.name] = by_prompt
    shown = list(answered)[:MOST_ARMS]
    asked = Counter(prompt for name in shown for prompt in answered[name])
    made = []
    for prompt, _ in asked.most_common(MOST_PROMPTS):
        rows = {name: answered[name][prompt] for name in shown if prompt in answered[name]}
        taught = next((row for row in rows.values() if row.get("teacher") is not None), None)
        answers = [] if taught is None else [_answer("the teacher", taught, "teacher")]
        answers += [
            replace(_answer(name, row, "after"), rouge=number(row, "rouge_after"), tone=tones.get(name))
            for name, row in rows.items()
        ]
        made.append(Sample(prompt=_cut(next(iter(rows.values()))["prompt"]), answers=tuple(answers)))
    return made


def _answer(who: str, row: Mapping[str, Any], side: str) -> Answer:
    return Answer(who=who, text=_cut(str(row[side])), rouge=None, tone=None, id=response_id(row, side))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS].rstrip()} …"
