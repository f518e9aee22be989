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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import AskedAnswers, EvaluationContext, Who, sampled
from limbeck.evaluation.group import GroupInPieces, GroupResult, Need
from limbeck.evaluation.pieces import Piece, longest_first
from limbeck.fields import STRICT, NonNegative, Seed
from limbeck.prompts.references import require_references
from limbeck.types import Json, LimbeckError, Prompt, Response, Sampling, ScoredRow

if TYPE_CHECKING:
    from limbeck.evaluation.fidelity import Fidelity
    from limbeck.evaluation.token_metrics.values import TokenValues

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
class FidelityGroup(GroupInPieces):
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

    @classmethod
    def on_responses(cls, condition: str, options: Mapping[str, object]) -> bool:
        del options
        return not condition or condition.startswith("teacher=")

    def needs(self) -> frozenset[Need]:
        more: dict[str, Need] = {"references": "references", "teacher": "teacher_answers"}
        answers: tuple[Need, ...] = ("prompts",) if self.scores_fresh else ()
        return frozenset({"teacher", "tokens", *answers, *(more[whose] for whose in self.whose if whose in more)})

    @property
    def scores_fresh(self) -> bool:
        return bool({*self.whose} - {"responses"})

    @property
    def takes_both(self) -> bool:
        return self.scores_fresh

    def check(self, evaluation: EvaluationContext) -> None:
        if not self.whose or len(set(self.whose)) < len(self.whose):
            raise LimbeckError(
                f"evaluate.groups.fidelity.whose is {list(self.whose)}; expected one or more of responses, teacher, "
                "student and references, each once: name what to measure on, or leave fidelity out of evaluate.groups"
            )

    def inputs(self, evaluation: EvaluationContext) -> Json:
        return {"loss_on": evaluation.loss_on} if "references" in self.whose else {}

    def asks(self, evaluation: EvaluationContext) -> Iterator[AskedAnswers]:
        for source in dict.fromkeys(_source(evaluation, whose) for whose in self.whose):
            if source == "teacher" or source == "student":
                yield AskedAnswers(who=source, sampling=self._sampling(evaluation), prompts=_fitting(evaluation))

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        found: dict[Whose, Fidelity] = {}
        tables: dict[str, Sequence[ScoredRow]] = {}
        detail: Json = {}
        for whose in self.whose:
            source = _source(evaluation, whose)
            if source not in found:
                found[source] = self._measured(evaluation, source)
            tables["" if whose == "responses" else whose] = found[source].rows
            tables |= _by_teacher(evaluation, "" if whose == "responses" else whose, found[source].rows)
            detail[whose] = {"answers": source, "top_k": self.top_k} | found[source].detail
        return GroupResult(tables=tables, detail=detail)

    def _measured(self, evaluation: EvaluationContext, source: Whose) -> Fidelity:
        from limbeck.evaluation.fidelity import Examples, joined

        responses = self._answers(evaluation, source).responses
        batches = longest_first(responses, evaluation.scoring_batch_size)

        def values() -> Iterator[tuple[Examples, TokenValues]]:
            with evaluation.meter("evaluate", sum(r.tokens for r in responses), "tokens") as meter:
                for rows, piece in zip(batches, evaluation.pieces(self, source, len(batches)), strict=True):
                    some = [responses[row] for row in rows]
                    lengths = tuple(response.tokens for response in some)
                    yield (tuple(response.prompt_id for response in some), lengths), _values(piece)
                    meter.advance(sum(lengths))

        return joined(values())

    def pieces(self, evaluation: EvaluationContext, of: str, numbers: Iterable[int]) -> Iterator[Piece]:
        from limbeck.evaluation.fidelity import chunk_of, values_of
        from limbeck.models.heads import head_of
        from limbeck.models.vocabulary import real_vocab_size

        answers = self._answers(evaluation, of)  # type: ignore[arg-type]
        batches = longest_first(answers.responses, evaluation.scoring_batch_size)
        model, teacher = evaluation.student.model, evaluation.scoring_teacher(stored=answers.stored)
        # One that was not trained here may have control tokens that the teacher lacks.
        head = head_of(model, real_vocab_size(evaluation.tokenizer("teacher")))
        for number in numbers:
            chunk = chunk_of(model, head, answers.responses, batches[number], teacher, device=evaluation.device)
            yield _piece(values_of(chunk, top_k=self.top_k))

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
            responses = evaluation.answers(source, self._sampling(evaluation), _fitting(evaluation))
        return _Answers(responses=[response for response in responses if response.response_ids])

    def _sampling(self, evaluation: EvaluationContext) -> Sampling:
        return sampled(evaluation.settings, self.temperature, self.seed)


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
    answered = all(prompt.answered for prompt in evaluation.prompts[: evaluation.settings.prompts])
    return "references" if answered else "teacher"


def _fitting(evaluation: EvaluationContext) -> list[Prompt]:
    """The prompts that leave room for an answer in the windows of both models: each model reads the other's answers."""
    held, most = evaluation.prompts[: evaluation.settings.prompts], evaluation.settings.max_new_tokens
    both: tuple[Who, Who] = ("teacher", "student")
    room = [{asked.id for asked in evaluation.encode(who, held, max_new_tokens=most)} for who in both]
    return [prompt for prompt in held if all(prompt.id in ids for ids in room)]


def _piece(found: TokenValues) -> Piece:
    """What was measured on the tokens of a batch."""
    tensors = {"values": found.values_MN}
    for number, (confidence_N, outcome_N) in enumerate(found.confidences):
        tensors |= {f"confidence.{number}": confidence_N, f"outcome.{number}": outcome_N}
    return Piece(tensors=tensors, record={"names": found.names, "calibrations": found.calibrations})


def _values(piece: Piece) -> TokenValues:
    """What a piece was made of."""
    from limbeck.evaluation.token_metrics.values import TokenValues

    names, calibrations = tuple(piece.record["names"]), tuple(piece.record["calibrations"])
    found = piece.tensors
    pairs = tuple((found[f"confidence.{number}"], found[f"outcome.{number}"]) for number in range(len(calibrations)))
    return TokenValues(values_MN=found["values"], confidences=pairs, names=names, calibrations=calibrations)
