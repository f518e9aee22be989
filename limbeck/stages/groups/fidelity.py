"""The group `fidelity`: next-token distributions of both models on the same answers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from limbeck.evaluation.fidelity import FidelityChunk, measure
from limbeck.models.heads import head_of
from limbeck.models.hidden import hidden_states
from limbeck.models.vocabulary import real_vocab_size
from limbeck.stages.exam import Exam, Group, Measured
from limbeck.stages.responses import load_responses
from limbeck.stages.signal import JUDGE_ROWS, open_teacher
from limbeck.student.batches import collate


def _measure(exam: Exam) -> Measured:
    return Measured(tables={"": measure(_chunks(exam))})


def _chunks(exam: Exam) -> Iterator[FidelityChunk]:
    """Held-out responses as the student and the teacher see them, a few rows at a time."""
    by_row = load_responses(exam.story, "heldout")
    responses = list(by_row.values())
    teacher = open_teacher(exam.story, list(by_row))
    model, device = exam.student.model, exam.story.device
    head = head_of(model, real_vocab_size(exam.student.tokenizer))
    order = sorted(range(len(responses)), key=lambda i: (-responses[i].length, i))
    with exam.meter("evaluate", sum(len(r.response_ids) for r in responses), "tokens") as meter:
        for start in range(0, len(order), JUDGE_ROWS):
            batch = collate(responses, order[start : start + JUDGE_ROWS], pad_id=0)
            with torch.inference_mode():
                hidden_ND = hidden_states(model, batch.to(device))
            yield FidelityChunk(
                student_hidden_ND=hidden_ND,
                student_head=head,
                teacher=teacher.signal(batch),  # type: ignore[arg-type]
                label_ids_N=batch.labels_N.to(device),
                ids=tuple(responses[i].prompt_id for i in batch.rows),
                lengths=tuple(len(responses[i].response_ids) for i in batch.rows),
            )
            meter.advance(len(batch.labels_N))


GROUP = Group(name="fidelity", measure=_measure, needs=lambda section: frozenset({"teacher", "tokens"}))
