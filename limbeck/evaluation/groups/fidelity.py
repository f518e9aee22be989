"""The group `fidelity`: next-token distributions of both models on the same answers.

Whose answers (`evaluate.groups.fidelity.whose`) is the condition: the held-out responses of the run (plain names), the
data's references, or fresh answers of the teacher or of the student. On the student's own answers the two models meet
what the student leads them into; what fidelity is worse there than on the teacher's is exposure bias (compare Arora
et al. 2022).

An evaluation on its own has no responses. There "responses" are the references where every prompt has one, else fresh
answers of the teacher; `answers` in the detail says which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext, EvaluationGroup, GroupResult, Need, Who
from limbeck.fields import STRICT, NonNegative, Seed
from limbeck.prompts.references import require_references
from limbeck.types import Json, LimbeckError, Prompt, Response, Sampling, ScoredRow

if TYPE_CHECKING:
    from limbeck.evaluation.fidelity import Fidelity
    from limbeck.evaluation.token_metrics.likeliest_teacher import LikeliestChunk
    from limbeck.evaluation.token_metrics.tokens import FidelityChunk

Whose = Literal["responses", "teacher", "student", "references"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Answers:
    """The responses that both models read.

    Attributes:
        stored: the run may have kept what its teacher said of them; else the teacher itself has to look.
    """

    responses: Sequence[Response]
    stored: bool = False


@dataclass(config=STRICT, kw_only=True)
class FidelityGroup(EvaluationGroup):
    """Next-token distributions of both models on the same answers, over the whole vocabulary."""

    whose: tuple[Whose, ...] = ("responses",)
    """Whose answers the two models are compared on: the held-out responses of the run, fresh ones of the teacher or of
    the student (exposure bias), or the data's references."""
    top_k: Annotated[int, Field(ge=2)] = 5
    """Tokens of the top-k agreement."""
    temperature: NonNegative = 1.0
    """Of the fresh answers; their length is evaluate.max_new_tokens."""
    seed: Seed = 0

    references_remedy = "take references out of evaluate.groups.fidelity.whose"
    takes_likeliest = True

    def needs(self) -> frozenset[Need]:
        more: dict[str, Need] = {"references": "references", "teacher": "teacher_weights"}
        return frozenset({"teacher", "tokens", *(need for whose, need in more.items() if whose in self.whose)})

    @property
    def scores_fresh(self) -> bool:
        return bool({*self.whose} - {"responses"})

    def check(self, evaluation: EvaluationContext) -> None:
        if not self.whose or len(set(self.whose)) < len(self.whose):
            raise LimbeckError(
                f"evaluate.groups.fidelity.whose is {list(self.whose)}; expected one or more of responses, teacher, "
                "student and references, each once: name what to measure on, or leave fidelity out of evaluate.groups"
            )

    def inputs(self, evaluation: EvaluationContext) -> Json:
        return {"loss_on": evaluation.loss_on} if "references" in self.whose else {}

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        from limbeck.evaluation.fidelity import measure

        found: dict[Whose, Fidelity] = {}
        tables: dict[str, Sequence[ScoredRow]] = {}
        detail: Json = {}
        for whose in self.whose:
            source = _source(evaluation, whose)
            if source not in found:
                found[source] = measure(_chunks(evaluation, self._answers(evaluation, source)), top_k=self.top_k)
            tables["" if whose == "responses" else whose] = found[source].rows
            tables |= _by_teacher(evaluation, "" if whose == "responses" else whose, found[source].rows)
            detail[whose] = {"answers": source, "top_k": self.top_k} | found[source].detail
        return GroupResult(tables=tables, detail=detail)

    def _answers(self, evaluation: EvaluationContext, source: Whose) -> _Answers:
        if source == "responses":
            by_row = evaluation.heldout_responses()
            return _Answers(responses=list(by_row.values()), stored=True)
        settings = evaluation.settings
        if source == "references":
            remedy = "give data with answers, or leave references out of evaluate.groups.fidelity.whose"
            require_references(evaluation.prompts[: settings.prompts], remedy)
            responses = evaluation.encode_references("teacher", _fitting(evaluation))
        else:
            sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=self.temperature, seed=self.seed)
            responses = evaluation.answers(source, sampling, _fitting(evaluation))
        return _Answers(responses=[response for response in responses if response.response_ids])


def _by_teacher(
    evaluation: EvaluationContext, condition: str, rows: Sequence[ScoredRow]
) -> dict[str, Sequence[ScoredRow]]:
    """The rows of each of several teachers, as tables of their own: CONDITION,teacher=NAME."""
    tables: dict[str, list[ScoredRow]] = {}
    for row in rows:
        if (name := evaluation.domain_of(row.id)) is not None:
            tables.setdefault(",".join(filter(None, (condition, f"teacher={name}"))), []).append(row)
    return dict(tables)


def _source(evaluation: EvaluationContext, whose: Whose) -> Whose:
    """Source of the answers: an evaluation without a run has no responses."""
    if whose != "responses" or not evaluation.standalone:
        return whose
    answered = all(prompt.completion is not None for prompt in evaluation.prompts[: evaluation.settings.prompts])
    return "references" if answered else "teacher"


def _fitting(evaluation: EvaluationContext) -> list[Prompt]:
    """The prompts that leave room for an answer in the windows of both models: each model reads the other's answers."""
    held, most = evaluation.prompts[: evaluation.settings.prompts], evaluation.settings.max_new_tokens
    both: tuple[Who, Who] = ("teacher", "student")
    room = [{asked.id for asked in evaluation.encode(who, held, max_new_tokens=most)} for who in both]
    return [prompt for prompt in held if all(prompt.id in ids for ids in room)]


def _chunks(evaluation: EvaluationContext, answers: _Answers) -> Iterator[FidelityChunk | LikeliestChunk]:
    """The answers as the student and the teacher see them, a few rows at a time."""
    from limbeck.evaluation.fidelity import chunks_of
    from limbeck.models.heads import head_of
    from limbeck.models.vocabulary import real_vocab_size

    responses, teacher = answers.responses, evaluation.scoring_teacher(stored=answers.stored)
    model = evaluation.student.model
    # One that was not trained here may have control tokens that the teacher lacks.
    head = head_of(model, real_vocab_size(evaluation.tokenizer("teacher")))
    with evaluation.meter("evaluate", sum(r.tokens for r in responses), "tokens") as meter:
        for chunk in chunks_of(
            model,
            head,
            dict(enumerate(responses)),
            teacher,
            batch_size=evaluation.scoring_batch_size,
            device=evaluation.device,
        ):
            yield chunk
            meter.advance(len(chunk.label_ids_N))
