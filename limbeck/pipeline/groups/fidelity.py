"""The group `fidelity`: next-token distributions of both models on the same answers.

Whose answers (`evaluate.fidelity.whose`) is the condition: the held-out responses of the run (plain names), the data's
references, or fresh answers of the teacher or of the student. On the student's own answers the two models meet what the
student leads them into; what fidelity is worse there than on the teacher's is exposure bias (compare Arora
et al. 2022).

An evaluation on its own has no responses. There "responses" are the references where every prompt has one, else fresh
answers of the teacher; `answers` in the detail says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from limbeck.evaluation.fidelity import Fidelity, measure
from limbeck.evaluation.token_metrics.tokens import FidelityChunk
from limbeck.models.forward import hidden_states
from limbeck.models.heads import head_of
from limbeck.models.vocabulary import real_vocab_size
from limbeck.pipeline.engine import RunContext
from limbeck.pipeline.evaluation_context import EvaluationContext, Group, GroupResult, Need, Who
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import SCORING_BATCH_SIZE, open_teacher
from limbeck.prompts.references import require_references
from limbeck.prompts.templates import encode_responses
from limbeck.recipe.evaluation import EvaluateSection, Whose
from limbeck.rollouts.collate import collate
from limbeck.teachers.local import LocalTeacher
from limbeck.types import DenseSignal, Json, LimbeckError, Prompt, Response, Sampling, ScoredRow, Teacher


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What both models read.

    Attributes:
        rows: row of each response in what the run kept of its teacher; None where the teacher itself has to look.
    """

    responses: Sequence[Response]
    rows: Sequence[int] | None = None


def _measure(evaluation: EvaluationContext) -> GroupResult:
    found: dict[Whose, Fidelity] = {}
    tables: dict[str, Sequence[ScoredRow]] = {}
    detail: Json = {}
    for whose in evaluation.section.fidelity.whose:
        source = _source(evaluation, whose)
        if source not in found:
            found[source] = measure(
                _chunks(evaluation, _answers(evaluation, source)), top_k=evaluation.section.fidelity.top_k
            )
        tables["" if whose == "responses" else whose] = found[source].rows
        detail[whose] = {"answers": source, "top_k": evaluation.section.fidelity.top_k} | found[source].detail
    return GroupResult(tables=tables, detail=detail)


def _source(evaluation: EvaluationContext, whose: Whose) -> Whose:
    """Whose answers are meant: an evaluation on its own has no responses."""
    if whose != "responses" or evaluation.context.run.manifest("responses") is not None:
        return whose
    answered = all(prompt.completion is not None for prompt in evaluation.prompts[: evaluation.section.prompts])
    return "references" if answered else "teacher"


def _answers(evaluation: EvaluationContext, source: Whose) -> _Answers:
    if source == "responses":
        by_row = load_responses(evaluation.context, "heldout")
        return _Answers(responses=list(by_row.values()), rows=list(by_row))
    section, prompts = evaluation.section, evaluation.context.recipe.prompts
    if source == "references":
        remedy = "give data with answers, or leave references out of evaluate.fidelity.whose"
        require_references(evaluation.prompts[: section.prompts], remedy)
        responses = encode_responses(
            _fitting(evaluation),
            evaluation.teacher.tokenizer,
            evaluation.teacher.template,
            max_new_tokens=section.max_new_tokens,
            control_tokens=prompts.control_tokens,
            chat_options=prompts.chat_options,
            loss_on=prompts.loss_on,
        )
    else:
        sampling = Sampling(
            max_new_tokens=section.max_new_tokens,
            temperature=section.fidelity.temperature,
            seed=section.fidelity.seed,
        )
        responses = evaluation.answers(source, sampling, _fitting(evaluation))
    return _Answers(responses=[response for response in responses if response.response_ids])


def _fitting(evaluation: EvaluationContext) -> list[Prompt]:
    """The prompts that leave room for an answer in the windows of both models: each reads what the other wrote."""
    held, most = evaluation.prompts[: evaluation.section.prompts], evaluation.section.max_new_tokens
    both: tuple[Who, Who] = ("teacher", "student")
    room = [{asked.id for asked in evaluation.encode(who, held, max_new_tokens=most)} for who in both]
    return [prompt for prompt in held if all(prompt.id in ids for ids in room)]


def _teacher(evaluation: EvaluationContext, answers: _Answers) -> Teacher:
    if answers.rows is not None and evaluation.context.recipe.signal.cache:
        return open_teacher(evaluation.context, answers.rows)
    model, vocab_size = evaluation.teacher.model, real_vocab_size(evaluation.teacher.tokenizer)
    return LocalTeacher(model, head_of(model, vocab_size))  # type: ignore[arg-type]


def _chunks(evaluation: EvaluationContext, answers: _Answers) -> Iterator[FidelityChunk]:
    """The answers as the student and the teacher see them, a few rows at a time."""
    responses, teacher = answers.responses, _teacher(evaluation, answers)
    model, device = evaluation.student.model, evaluation.context.device
    # One that was not trained here may have control tokens that the teacher lacks.
    head = head_of(model, real_vocab_size(evaluation.tokenizer("teacher")))
    order = sorted(range(len(responses)), key=lambda i: (-responses[i].length, i))
    with evaluation.meter("evaluate", sum(r.tokens for r in responses), "tokens") as meter:
        for start in range(0, len(order), SCORING_BATCH_SIZE):
            batch = collate(responses, order[start : start + SCORING_BATCH_SIZE], pad_id=0)
            with torch.inference_mode():
                hidden_ND = hidden_states(model, batch.to(device))
            signal = teacher.signal(batch)
            assert isinstance(signal, DenseSignal), "held-out rows are kept whole"
            yield FidelityChunk(
                student_hidden_ND=hidden_ND,
                student_head=head,
                teacher=signal,
                label_ids_N=batch.labels_N.to(device),
                ids=tuple(responses[i].prompt_id for i in batch.rows),
                lengths=tuple(responses[i].tokens for i in batch.rows),
            )
            meter.advance(len(batch.labels_N))


def _needs(section: EvaluateSection) -> frozenset[Need]:
    references: tuple[Need, ...] = ("references",) if "references" in section.fidelity.whose else ()
    return frozenset({"teacher", "tokens", *references})


def _check(context: RunContext) -> None:
    whose = context.recipe.evaluate.fidelity.whose
    if not whose or len(set(whose)) < len(whose):
        raise LimbeckError(
            f"evaluate.fidelity.whose is {list(whose)}; expected one or more of responses, teacher, student and "
            "references, each once: name what to measure on, or leave fidelity out of evaluate.groups"
        )


GROUP = Group(name="fidelity", measure=_measure, needs=_needs, check=_check)
