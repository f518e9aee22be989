"""The group `diversity`: several sampled answers to a prompt, at each of some decoding temperatures.

A prompt gets `samples` answers per temperature (seeds seed, seed + 1, ...; whole vocabulary, length
evaluate.max_new_tokens). Their difference is measured by distinct-1, distinct-2, Self-BLEU and their mean length, see
`evaluation.diversity`; how likely they are by their mean negative log-probability at temperature 1, which at decoding
temperature 1 estimates the entropy. How good they are is the mean ROUGE-L of the same samples: beside the reference
answers where each prompt has one, else beside the teacher's greedy answers. The two together are a point of the
fidelity-diversity curve, and the temperatures draw it (CSD, figure 3). The teacher's samples are measured in the same
way, since a student is as diverse as it should be where it equals its teacher.

All are means over prompts, under conditions such as "T=0.7". Distinct-n over all answers to all prompts, which also
shows whether different prompts get the same answer, is in the detail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import BOTH, AskedAnswers, EvaluationContext, Who, greedy, response_text, sampled
from limbeck.evaluation.diversity import distinct, diversity, sample_nll
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.rouge import best_rouge_l, scorable
from limbeck.fields import STRICT, Count, NonNegative, Seed
from limbeck.types import Json, LimbeckError, Prompt, Sampling, ScoredRow

References = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Samples:
    """The answers of one model to one prompt."""

    texts: Sequence[str]
    logps: Sequence[Sequence[float]]

    def values(self, references: Sequence[str] | None) -> dict[str, float]:
        found = diversity(self.texts) | {"sample_nll": sample_nll(self.logps)}
        if references is not None:
            found["sample_rouge_l"] = fmean(best_rouge_l(self.texts, [references] * len(self.texts)))
        return found


def condition(temperature: float) -> str:
    """Name of a decoding temperature in the names of metrics: T=1, T=0.7."""
    return f"T={temperature:g}"


@dataclass(config=STRICT, kw_only=True)
class DiversityGroup(EvaluationGroup):
    """How much several sampled answers to a prompt differ, and how good they are, at some temperatures."""

    temperatures: tuple[NonNegative, ...] = (1.0,)
    """Decoding temperatures; each is a point of the fidelity-diversity curve."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt."""
    prompts: Count | None = 64
    """At most so many prompts; null for all."""
    seed: Seed = 0

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "teacher_answers", "prompts"})

    def check(self, evaluation: EvaluationContext) -> None:
        conditions = {condition(temperature) for temperature in self.temperatures}
        if not self.temperatures or len(conditions) < len(self.temperatures):
            raise LimbeckError(
                f"evaluate.groups.diversity.temperatures is {list(self.temperatures)}; expected one or more that "
                "differ in their first six digits, such as [0.7, 1.0]"
            )

    def asks(self, evaluation: EvaluationContext) -> Iterator[AskedAnswers]:
        prompts = self._prompts(evaluation)
        for temperature in self.temperatures:
            for sampling in self._samplings(evaluation, temperature):
                for who in BOTH:
                    yield AskedAnswers(who=who, sampling=sampling, prompts=prompts, keep_logp=True)
        if not all(prompt.known_answers for prompt in prompts):
            yield AskedAnswers(who="teacher", sampling=greedy(evaluation.settings), prompts=prompts)

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        prompts = self._prompts(evaluation)
        beside, references = _references(evaluation, prompts)
        tables: dict[str, Sequence[ScoredRow]] = {}
        detail: Json = {"samples": self.samples, "prompts": len(prompts), "rouge_beside": beside, "corpus": {}}
        for temperature in self.temperatures:
            student, teacher = (self._sampled(evaluation, who, temperature, prompts) for who in BOTH)
            shared = [name for name in student if name in teacher]
            name_of = condition(temperature)
            tables[name_of] = [_row(name, student[name], teacher[name], references.get(name)) for name in shared]
            detail["corpus"][name_of] = {
                "student": _corpus([student[name] for name in shared]),
                "teacher": _corpus([teacher[name] for name in shared]),
            }
        return GroupResult(tables=tables, detail=detail)

    def _sampled(
        self, evaluation: EvaluationContext, who: Who, temperature: float, prompts: Sequence[Prompt]
    ) -> dict[str, _Samples]:
        """The samples of each prompt by its id."""
        tokenizer = evaluation.tokenizer(who)
        texts: dict[str, list[str]] = {}
        logps: dict[str, list[Sequence[float]]] = {}
        for sampling in self._samplings(evaluation, temperature):
            for response in evaluation.answers(who, sampling, prompts, keep_logp=True):
                assert response.logp is not None
                texts.setdefault(response.prompt_id, []).append(response_text(response, tokenizer))
                logps.setdefault(response.prompt_id, []).append(response.logp)
        return {name: _Samples(texts=texts[name], logps=logps[name]) for name in texts}

    def _prompts(self, evaluation: EvaluationContext) -> Sequence[Prompt]:
        return evaluation.prompts[: evaluation.settings.prompts][: self.prompts]

    def _samplings(self, evaluation: EvaluationContext, temperature: float) -> list[Sampling]:
        # Greedy answers do not depend on the seed, and are written once.
        seeds = [self.seed + (number if temperature > 0 else 0) for number in range(self.samples)]
        return [sampled(evaluation.settings, temperature, seed) for seed in seeds]


def _row(name: str, student: _Samples, teacher: _Samples, references: Sequence[str] | None) -> ScoredRow:
    of_teacher = {f"teacher_{metric}": value for metric, value in teacher.values(references).items()}
    return ScoredRow(id=name, weight=1.0, values=student.values(references) | of_teacher)


def _corpus(every: Sequence[_Samples]) -> Json:
    texts = [text for samples in every for text in samples.texts]
    return {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}


def _references(evaluation: EvaluationContext, prompts: Sequence[Prompt]) -> tuple[str | None, References]:
    """The answers that ROUGE-L compares the samples with, by prompt id, and their author."""
    beside, found = "references", {prompt.id: prompt.known_answers for prompt in prompts}
    if not all(found.values()):
        greedy_texts = evaluation.texts("teacher", greedy(evaluation.settings), prompts)
        beside, found = "teacher", {name: (text,) for name, text in greedy_texts.items()}
    if not scorable(text for texts in found.values() for text in texts):
        evaluation.console.warn(
            f"diversity: no answer of the {beside} holds a letter a-z or a digit, all that ROUGE-L sees; "
            "sample_rouge_l is left out"
        )
        return None, {}
    return beside, found
