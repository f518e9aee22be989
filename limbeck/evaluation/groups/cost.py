"""The group `cost`: size, memory and speed of the student beside the teacher.

What is counted is one row; what is timed is a row a repeat, so that its interval says how steady this machine is, not
how far other prompts would differ. Seconds are never the same twice.
"""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import BOTH, EvaluationContext, Who
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.fields import STRICT, Count
from limbeck.types import Json, ScoredRow

if TYPE_CHECKING:
    from limbeck.evaluation.cost import Timing


@dataclass(config=STRICT, kw_only=True)
class CostGroup(EvaluationGroup):
    """Parameters, memory, reading and writing speed of both models."""

    prompt_tokens: Count = 256
    """Length of the prompt that is read."""
    new_tokens: Count = 32
    """Tokens decoded one by one."""
    repeats: Count = 3
    """Each is measured so often; the detail has the medians."""

    parts = ("after",)

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "teacher_weights", "prompts"})

    @property
    def takes_both(self) -> bool:
        # They are timed in turns.
        return True

    def check(self, evaluation: EvaluationContext) -> None:
        from limbeck.evaluation.cost import require_window

        require_window("pair", {"max_position_embeddings": evaluation.window}, self.prompt_tokens + self.new_tokens)

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        from limbeck.evaluation.cost import timed_in_turns

        sizes: dict[Who, dict[str, float]] = {who: _sizes(evaluation, who) for who in BOTH}
        timings = timed_in_turns(
            {who: (evaluation.speaker(who).model, self._prompt(evaluation, who)) for who in BOTH},
            new_tokens=self.new_tokens,
            repeats=self.repeats,
        )
        counted = ScoredRow(
            id="model", weight=1.0, values={_name(w, key): v for w in BOTH for key, v in sizes[w].items()}
        )
        timed = [
            ScoredRow(id=f"repeat {number}", weight=1.0, values=self._speeds(student, teacher))
            for number, (student, teacher) in enumerate(zip(*(timings[who] for who in BOTH), strict=True), start=1)
        ]
        return GroupResult(tables={"": [counted], f"prompt={self.prompt_tokens}": timed}, detail=_detail(sizes, timed))

    def _prompt(self, evaluation: EvaluationContext, who: Who) -> list[int]:
        """Tokens of the held-out prompts, one behind the other, over and over where they are too few."""
        asked = evaluation.encode(who, evaluation.prompts, max_new_tokens=1)
        endless = itertools.cycle(itertools.chain.from_iterable(prompt.ids for prompt in asked))
        return list(itertools.islice(endless, self.prompt_tokens))

    def _speeds(self, student: Timing, teacher: Timing) -> dict[str, float]:
        found = {}
        for who, timing in zip(BOTH, (student, teacher), strict=True):
            found[_name(who, "prefill_speed")] = self.prompt_tokens / timing.prefill_s
            found[_name(who, "decode_speed")] = 1 / timing.step_s
        return found


def _name(who: Who, metric: str) -> str:
    return metric if who == "student" else f"teacher_{metric}"


def _sizes(evaluation: EvaluationContext, who: Who) -> dict[str, float]:
    from limbeck.evaluation.cost import parameters, weight_bytes
    from limbeck.sampling.batching import cache_bytes_per_token

    model = evaluation.speaker(who).model
    return {
        "parameters": parameters(model) / 1e6,
        "disk_size": _bytes_on_disk(evaluation, who) / 1e6,
        "weight_memory": weight_bytes(model) / 1e6,
        "cache_size": cache_bytes_per_token(model) / 1e3,
    }


def _bytes_on_disk(evaluation: EvaluationContext, who: Who) -> int:
    """Of the weights, as they are stored."""
    from limbeck.models.fingerprints import weight_files
    from limbeck.models.sources import resolve

    place = evaluation.source(who)
    found = resolve(place.model, revision=place.revision, trust_remote_code=place.trust_remote_code)
    return sum(path.stat().st_size for path in weight_files(found) if path.name != "config.json")


def _detail(sizes: dict[Who, dict[str, float]], timed: list[ScoredRow]) -> Json:
    """Everything of both models, speeds as medians of the repeats, and what the student has of each."""
    both: dict[Who, dict[str, float]] = {
        who: sizes[who]
        | {
            key: statistics.median(row.values[_name(who, key)] for row in timed)
            for key in ("prefill_speed", "decode_speed")
        }
        for who in BOTH
    }
    ratio = {key: value / both["teacher"][key] for key, value in both["student"].items()}
    return {**both, "student_over_teacher": ratio}
