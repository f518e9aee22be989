"""The group `diversity`: several sampled answers to a prompt, at each of some decoding temperatures.

A prompt gets `evaluate.diversity.samples` answers a temperature (seeds seed, seed + 1, ...; whole vocabulary, length
evaluate.max_new_tokens). How much they differ is told by distinct-1, distinct-2, Self-BLEU and their mean length, see
`evaluation.diversity`; how likely they are by their mean negative log-probability at temperature 1, which at decoding
temperature 1 estimates the entropy. How good they are is the mean ROUGE-L of the same samples: beside the reference
answers where each prompt has one, else beside the teacher's greedy answers. The two together are a point of the
fidelity-diversity curve, and the temperatures draw it (CSD, figure 3). The teacher's samples are measured in the same
way, since a student is as diverse as it should be where it equals its teacher.

All are means over prompts, under conditions such as "T=0.7". Distinct-n over all answers to all prompts, which also
tells whether different prompts get the same answer, is in the detail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from limbeck.evaluation.diversity import distinct, diversity, sample_nll
from limbeck.evaluation.rouge import best_rouge_l, scorable
from limbeck.pipeline.engine import RunContext
from limbeck.pipeline.evaluation_context import EvaluationContext, Group, GroupResult, Need, Who, response_text
from limbeck.pipeline.groups.rouge import greedy
from limbeck.recipe.evaluation import EvaluateSection
from limbeck.types import Json, LimbeckError, Prompt, Sampling, ScoredRow

References = Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
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
    """What a decoding temperature is called in the names of metrics: T=1, T=0.7."""
    return f"T={temperature:g}"


def _measure(evaluation: EvaluationContext) -> GroupResult:
    section = evaluation.section.diversity
    prompts = evaluation.prompts[: evaluation.section.prompts][: section.prompts]
    beside, references = _references(evaluation, prompts)
    tables: dict[str, Sequence[ScoredRow]] = {}
    detail: Json = {"samples": section.samples, "prompts": len(prompts), "rouge_beside": beside, "corpus": {}}
    for temperature in section.temperatures:
        student, teacher = (_sampled(evaluation, who, temperature, prompts) for who in ("student", "teacher"))
        shared = [name for name in student if name in teacher]
        name_of = condition(temperature)
        tables[name_of] = [_row(name, student[name], teacher[name], references.get(name)) for name in shared]
        detail["corpus"][name_of] = {
            "student": _corpus([student[name] for name in shared]),
            "teacher": _corpus([teacher[name] for name in shared]),
        }
    return GroupResult(tables=tables, detail=detail)


def _row(name: str, student: _Samples, teacher: _Samples, references: Sequence[str] | None) -> ScoredRow:
    of_teacher = {f"teacher_{metric}": value for metric, value in teacher.values(references).items()}
    return ScoredRow(id=name, weight=1.0, values=student.values(references) | of_teacher)


def _corpus(every: Sequence[_Samples]) -> Json:
    texts = [text for samples in every for text in samples.texts]
    return {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}


def _references(evaluation: EvaluationContext, prompts: Sequence[Prompt]) -> tuple[str | None, References]:
    """Whose answers the samples are set beside, and these by prompt id; nothing where ROUGE-L cannot read them."""
    beside, found = "references", {prompt.id: prompt.known_answers for prompt in prompts}
    if not all(found.values()):
        greedy_texts = evaluation.texts("teacher", greedy(evaluation.section), prompts)
        beside, found = "teacher", {name: (text,) for name, text in greedy_texts.items()}
    if not scorable(text for texts in found.values() for text in texts):
        evaluation.context.console.warn(
            f"diversity: no answer of the {beside} holds a letter a-z or a digit, all that ROUGE-L sees; "
            "sample_rouge_l is left out"
        )
        return None, {}
    return beside, found


def _sampled(
    evaluation: EvaluationContext, who: Who, temperature: float, prompts: Sequence[Prompt]
) -> dict[str, _Samples]:
    """The samples of each prompt by its id."""
    section = evaluation.section.diversity
    tokenizer = evaluation.tokenizer(who)
    texts: dict[str, list[str]] = {}
    logps: dict[str, list[Sequence[float]]] = {}
    for number in range(section.samples):
        # Greedy answers do not depend on the seed, and are written once.
        seed = section.seed + (number if temperature > 0 else 0)
        sampling = Sampling(max_new_tokens=evaluation.section.max_new_tokens, temperature=temperature, seed=seed)
        for response in evaluation.answers(who, sampling, prompts, keep_logp=True):
            assert response.logp is not None
            texts.setdefault(response.prompt_id, []).append(response_text(response, tokenizer))
            logps.setdefault(response.prompt_id, []).append(response.logp)
    return {name: _Samples(texts=texts[name], logps=logps[name]) for name in texts}


def _check(context: RunContext) -> None:
    temperatures = context.recipe.evaluate.diversity.temperatures
    if not temperatures or len({condition(temperature) for temperature in temperatures}) < len(temperatures):
        raise LimbeckError(
            f"evaluate.diversity.temperatures is {list(temperatures)}; expected one or more that differ in their first "
            "six digits, such as [0.7, 1.0]"
        )


def _needs(section: EvaluateSection) -> frozenset[Need]:
    del section
    return frozenset({"teacher"})


GROUP = Group(name="diversity", measure=_measure, needs=_needs, check=_check)
