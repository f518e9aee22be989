"""The group `speculation`: the student drafts for the teacher, one prompt at a time.

The teacher alone and with the draft answer in turns, with the same seeds and through the same sampler. A first answer
of each is not counted: it lays out weights. Seconds differ from run to run in their last digits, and with them the
speed-up; everything else is reproducible.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext, EvaluationGroup, GroupResult, Need
from limbeck.evaluation.scores.bootstrap import summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.evaluation.speculation import (
    Drafted,
    acceptance_rows,
    break_even,
    expected_speedup,
    expected_tokens_per_pass,
)
from limbeck.fields import STRICT, Count, NonNegative, Seed
from limbeck.runtime.records import read_fields
from limbeck.types import Json, LimbeckError, Response, Sampling, ScoredRow, TokenPrompt

if TYPE_CHECKING:
    from limbeck.sampling.acceptance import AcceptanceStats
    from limbeck.sampling.local import LocalSampler
    from limbeck.sampling.speculative import SpeculativeSampler

# Steps that the ratio of costs is measured over, and the times they are repeated.
_STEPS, _REPEATS = 16, 3


@dataclass(config=STRICT, kw_only=True)
class SpeculationGroup(EvaluationGroup):
    """The student as the draft of its teacher: acceptance, tokens per pass and speed-up."""

    draft_tokens: tuple[Count, ...] = (4,)
    """Tokens that the student drafts for each of the teacher's passes."""
    prompts: Count = 16
    temperature: NonNegative = 1.0
    seed: Seed = 0

    parts = ("after",)

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "teacher_weights", "tokens"})

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        sampling = Sampling(
            max_new_tokens=evaluation.settings.max_new_tokens, temperature=self.temperature, seed=self.seed
        )
        asked = self._asked(evaluation, sampling)
        ratio = _cost_ratio(evaluation, asked)
        tables: dict[str, list[ScoredRow]] = {}
        detail: Json = {"cost_ratio": ratio, "prompts": len(asked)}
        for draft_tokens in dict.fromkeys(self.draft_tokens):
            name = f"draft={draft_tokens}"
            tables[name] = acceptance_rows(_in_turns(evaluation, asked, sampling, draft_tokens))
            measured = summarise(tables[name])["draft_acceptance"].mean
            expected = {"measured": _expected(measured, draft_tokens, ratio)}
            if (share := _expected_acceptance(evaluation, sampling)) is not None:
                expected["fidelity"] = _expected(share, draft_tokens, ratio)
            detail[name] = {
                "break_even_acceptance": break_even(draft_tokens, ratio),
                "expected_from_acceptance": expected,
            }
        return GroupResult(tables=tables, detail=detail)

    def _asked(self, evaluation: EvaluationContext, sampling: Sampling) -> list[TokenPrompt]:
        """The prompts as the teacher reads them, those that fit both models."""
        prompts, most = evaluation.prompts[: self.prompts], sampling.max_new_tokens
        fits = {p.id for p in evaluation.encode("student", prompts, max_new_tokens=most)}
        asked = [p for p in evaluation.encode("teacher", prompts, max_new_tokens=most) if p.id in fits]
        if not asked:
            raise LimbeckError(
                "no held-out prompt fits both models with its answer, expected at least one to draft for; "
                "lower evaluate.max_new_tokens, or raise prompts.eval_fraction"
            )
        return asked


def _expected(acceptance: float, draft_tokens: int, ratio: float) -> Json:
    return {
        "acceptance": acceptance,
        "tokens_per_pass": expected_tokens_per_pass(acceptance, draft_tokens),
        "speedup": expected_speedup(acceptance, draft_tokens, ratio),
    }


def _cost_ratio(evaluation: EvaluationContext, asked: Sequence[TokenPrompt]) -> float:
    """Seconds of a step of the student over those of a step of the teacher."""
    from limbeck.evaluation.cost import timed_in_turns

    ids = asked[0].ids
    steps = min(_STEPS, evaluation.settings.max_new_tokens)
    timings = timed_in_turns(
        {"student": (evaluation.student.model, ids), "teacher": (evaluation.teacher.model, ids)},
        new_tokens=steps,
        repeats=_REPEATS,
    )
    student, teacher = (statistics.median(t.step_s for t in timings[who]) for who in ("student", "teacher"))
    return student / teacher


def _in_turns(
    evaluation: EvaluationContext, asked: Sequence[TokenPrompt], sampling: Sampling, draft_tokens: int
) -> list[Drafted]:
    from limbeck.sampling.speculative import SpeculativeSampler

    longest = max(asked, key=lambda prompt: len(prompt.ids))
    # Samplers answer the longest prompt first, and of two the earlier one.
    every = [replace(longest, id=f"{longest.id} (first)"), *asked]
    alone = evaluation.sampler("teacher", 1)
    drafted = SpeculativeSampler(
        model=alone.model,
        draft=evaluation.student.model,
        eos_token_ids=alone.eos_token_ids,
        pad_token_id=alone.pad_token_id,
        vocab_size=alone.vocab_size,
        tokenizer=alone.tokenizer,
        draft_tokens=draft_tokens,
        batch_size=1,
    )
    found = []
    answers = zip(_timed(evaluation, alone, every, sampling), _timed(evaluation, drafted, every, sampling), strict=True)
    with evaluation.meter(f"draft {draft_tokens} tokens", len(every), "answers") as meter:
        for number, ((by_itself, alone_s), (response, drafted_s)) in enumerate(answers):
            tally = drafted.tally.taken()
            if number:
                found.append(_drafted(by_itself, alone_s, response, drafted_s, tally))
            meter.advance(1)
    order = {prompt.id: place for place, prompt in enumerate(asked)}
    return sorted(found, key=lambda answer: order[answer.id])


def _timed(
    evaluation: EvaluationContext,
    sampler: LocalSampler | SpeculativeSampler,
    asked: Sequence[TokenPrompt],
    sampling: Sampling,
) -> Iterator[tuple[Response, float]]:
    """Each answer with the seconds it took; the sampler rests between two."""
    from limbeck.evaluation.cost import settle

    answers = sampler.respond_in_batches(asked, sampling)
    for _ in asked:
        evaluation.stop.raise_if_requested()
        settle(evaluation.device)
        started = time.perf_counter()
        (response,) = next(answers).responses
        settle(evaluation.device)
        yield response, time.perf_counter() - started


def _drafted(
    by_itself: Response, alone_s: float, response: Response, drafted_s: float, tally: AcceptanceStats
) -> Drafted:
    assert by_itself.prompt_id == response.prompt_id
    return Drafted(
        id=response.prompt_id,
        passes=tally.rounds,
        tokens=len(response.response_ids),
        accepted=tally.accepted,
        rejected=tally.rejected,
        alone_s=alone_s,
        alone_tokens=len(by_itself.response_ids),
        drafted_s=drafted_s,
    )


def _expected_acceptance(evaluation: EvaluationContext, sampling: Sampling) -> float | None:
    """1 - total variation on the teacher's answers (Leviathan et al., corollary 3.6), where fidelity measured it.

    It is of temperature 1, and of contexts that the teacher wrote: what a draft meets.
    """
    record = evaluation.folder / f"{evaluation.part}.fidelity.json"
    if sampling.temperature != 1 or not record.exists():
        return None
    conditions = read_fields(record, {"conditions": list})["conditions"]
    by_teacher = evaluation.responses_author == "teacher"
    name = "fidelity@teacher" if "teacher" in conditions else "fidelity" if "" in conditions and by_teacher else None
    if name is None:
        return None
    return summarise(read_rows(evaluation.folder / f"{evaluation.part}.{name}.jsonl"))["acceptance"].mean
