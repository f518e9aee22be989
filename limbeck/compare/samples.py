"""The same held-out prompts, answered by the teacher and the arms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limbeck.compare.runs import ComparedArm
from limbeck.report.read_run import number

MOST_PROMPTS, MOST_ARMS = 5, 6
# Longer answers are cut: what an arm is like shows in the beginning.
MOST_LETTERS = 700


@dataclass(frozen=True, kw_only=True)
class Answer:
    who: str
    text: str
    rouge: float | None
    tone: int | None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with its answers, the teacher's first."""

    prompt: str
    answers: tuple[Answer, ...]


def samples(arms: Sequence[ComparedArm], tones: Mapping[str, int]) -> list[Sample]:
    """Prompts that most arms answered, with the first run of each of the first few arms."""
    told = {}
    for arm in arms:
        rows = next((m.run.samples for m in arm.done if m.run is not None and m.run.samples), ())
        rows = {
            row["prompt"]: row for row in rows if isinstance(row.get("prompt"), str) and row.get("after") is not None
        }
        if rows:
            told[arm.name] = rows
    shown = list(told)[:MOST_ARMS]
    asked = Counter(prompt for name in shown for prompt in told[name])
    made = []
    for prompt, _ in asked.most_common(MOST_PROMPTS):
        rows = {name: told[name][prompt] for name in shown if prompt in told[name]}
        teacher = next((str(row["teacher"]) for row in rows.values() if row.get("teacher") is not None), None)
        answers = [] if teacher is None else [Answer(who="the teacher", text=_cut(teacher), rouge=None, tone=None)]
        answers += [
            Answer(who=name, text=_cut(str(row["after"])), rouge=number(row, "rouge_after"), tone=tones.get(name))
            for name, row in rows.items()
        ]
        made.append(Sample(prompt=_cut(prompt), answers=tuple(answers)))
    return made


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS].rstrip()} …"
