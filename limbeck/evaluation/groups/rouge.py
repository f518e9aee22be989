"""The group `rouge`: answers beside the teacher's, beside the reference answers of the data, or both.

`teacher`: greedy answers of both models (metric rouge_l).

`references`: the protocol of MiniLLM, DistiLLM and their followers (rouge_l_references). For each of `seeds` one answer
a prompt is sampled at `temperature` from the whole vocabulary (top-p 1, no top-k); ROUGE-L F1 with the stemmer, the
best of a prompt's references counts; the mean over the seeds is the prompt's value. The teacher's own answers, where
there is a teacher, are measured in the same way: it is rarely possible to get above them. The means of the seeds and
their standard deviation (n - 1) are in the detail; it is the spread of decoding, not of training.

To come near the papers' figures, which are 100 times these:

- Their length is 512 tokens, prompt (at most 256) and answer together; here evaluate.max_new_tokens, so 256.
- Their prompts are in the Alpaca template: prompts.template=alpaca.
- Their final evaluation forbids a 6-gram to repeat (no_repeat_ngram_size 6 is the default of the code of DistiLLM,
  AMiD and CSD). That is not done here: it changes the distribution that is measured. Weak students loop, and score
  lower without it.
- They measure whole test sets; here evaluate.prompts or prompts.eval_fraction may take a part of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import BOTH, AskedAnswers, EvaluationContext, Who, greedy, sampled
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.rouge import best_rouge_l, rouge_l
from limbeck.fields import STRICT, NonNegative, Seed
from limbeck.prompts.references import require_references
from limbeck.types import Json, LimbeckError, Sampling, ScoredRow

RougeValues = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BySeed:
    """ROUGE-L F1 by prompt id, one mapping per decoding seed."""

    scores: Sequence[Mapping[str, float]]

    def mean(self, name: str) -> float:
        return fmean(scores[name] for scores in self.scores)

    def record(self, names: Sequence[str]) -> Json:
        means = [fmean(scores[name] for name in names) for scores in self.scores]
        return {"means": means, "standard_deviation": stdev(means) if len(means) > 1 else None}


@dataclass(config=STRICT, kw_only=True)
class RougeGroup(EvaluationGroup):
    """ROUGE-L of the student's answers beside the teacher's, the data's, or both."""

    against: tuple[Literal["teacher", "references"], ...] = ("teacher",)
    """teacher: greedy answers beside the teacher's greedy ones. references: the papers' protocol, sampled answers
    beside the reference answers of the data, the best of several counts."""
    seeds: tuple[Seed, ...] = (10, 20, 30, 40, 50)
    """references: one answer per prompt for each; the mean over them is reported."""
    temperature: NonNegative = 1.0
    """references: of the sampled answers."""

    references_remedy = "set evaluate.groups.rouge.against to [teacher]"
    teacher_remedy = "set evaluate.groups.rouge.against=[references]"

    def needs(self) -> frozenset[Need]:
        needs: dict[str, tuple[Need, ...]] = {"teacher": ("teacher", "teacher_answers"), "references": ("references",)}
        return frozenset({"prompts", *(need for whose in self.against for need in needs[whose])})

    def check(self, evaluation: EvaluationContext) -> None:
        if not self.against:
            raise LimbeckError(
                "evaluate.groups.rouge.against is empty; expected teacher, references or both: name one, or leave "
                "rouge out of evaluate.groups"
            )
        if "references" not in self.against:
            return
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise LimbeckError(
                f"evaluate.groups.rouge.seeds is {list(self.seeds)}; expected one or more different seeds, such as "
                "[10, 20]"
            )
        if self.temperature == 0 and len(self.seeds) > 1:
            raise LimbeckError(
                f"evaluate.groups.rouge.temperature is 0, so all {len(self.seeds)} seeds give the same answers; "
                "expected one seed (evaluate.groups.rouge.seeds=[0]) or a temperature above 0"
            )

    def asks(self, evaluation: EvaluationContext) -> Iterator[AskedAnswers]:
        if "teacher" in self.against:
            for who in BOTH:
                yield AskedAnswers(who=who, sampling=greedy(evaluation.settings))
        if "references" in self.against:
            for who in _speaking(evaluation):
                yield from (AskedAnswers(who=who, sampling=sampling) for sampling in self._samplings(evaluation))

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        found: list[RougeValues] = []
        detail: Json = {}
        if "teacher" in self.against:
            found.append(_beside_teacher(evaluation))
        if "references" in self.against:
            values, detail["references"] = self._beside_references(evaluation)
            found.append(values)
        names = [name for name in found[0] if all(name in values for values in found)]
        rows = [
            ScoredRow(id=name, weight=1.0, values={k: v for values in found for k, v in values[name].items()})
            for name in names
        ]
        return GroupResult(tables={"": rows}, detail=detail)

    def _beside_references(self, evaluation: EvaluationContext) -> tuple[RougeValues, Json]:
        references = require_references(
            evaluation.prompts[: evaluation.settings.prompts],
            "give data with answers, or set evaluate.groups.rouge.against=[teacher]",
        )
        speaking = _speaking(evaluation)
        found = {who: self._by_seed(evaluation, who, references) for who in speaking}
        names = [name for name in found["student"].scores[0] if all(name in one.scores[0] for one in found.values())]
        called: dict[Who, str] = {"student": "rouge_l_references", "teacher": "teacher_rouge_l_references"}
        values = {name: {called[who]: found[who].mean(name) for who in speaking} for name in names}
        record: Json = {who: found[who].record(names) for who in speaking}
        return values, record | {
            "seeds": list(self.seeds),
            "prompts": len(names),
            "with_several": sum(len(references[name]) > 1 for name in names),
        }

    def _by_seed(self, evaluation: EvaluationContext, who: Who, references: Mapping[str, Sequence[str]]) -> _BySeed:
        scores = []
        for sampling in self._samplings(evaluation):
            texts = evaluation.texts(who, sampling)
            f1 = best_rouge_l(list(texts.values()), [references[name] for name in texts])
            scores.append(dict(zip(texts, f1, strict=True)))
        return _BySeed(scores=scores)

    def _samplings(self, evaluation: EvaluationContext) -> list[Sampling]:
        return [sampled(evaluation.settings, self.temperature, seed) for seed in self.seeds]


def _speaking(evaluation: EvaluationContext) -> tuple[Who, ...]:
    """Whose answers are set beside the references."""
    return BOTH if evaluation.has_teacher else ("student",)


def _beside_teacher(evaluation: EvaluationContext) -> RougeValues:
    student, teacher = (evaluation.texts(who, greedy(evaluation.settings)) for who in BOTH)
    shared = [name for name in student if name in teacher]
    rows = rouge_l(shared, candidates=[student[name] for name in shared], references=[teacher[name] for name in shared])
    return {row.id: dict(row.values) for row in rows}
