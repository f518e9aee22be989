"""Speculative decoding as it is measured: a teacher alone and with its student drafting, and what their passes cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from limbeck.evaluation.context import EvaluationContext
from limbeck.evaluation.cost import settle, timed_in_turns, timed_passes
from limbeck.evaluation.speculation import Drafted, PassCosts
from limbeck.sampling.acceptance import AcceptanceStats
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.types import Response, Sampling, TokenPrompt

# Steps that the ratio of costs is measured over, and the times they are repeated.
_STEPS, _REPEATS = 16, 3
# A pass is short, and whatever else the machine does shows in it.
_PASSES = 9
# The number of drafts a pass is looked for up to here, or up to the largest that is asked for.
_MOST_DRAFTS = 8


def cost_ratio(evaluation: EvaluationContext, asked: Sequence[TokenPrompt]) -> float:
    """Seconds of a step of the student over those of a step of the teacher."""
    ids = asked[0].ids
    steps = min(_STEPS, evaluation.settings.max_new_tokens)
    timings = timed_in_turns(
        {"student": (evaluation.student.model, ids), "teacher": (evaluation.teacher.model, ids)},
        new_tokens=steps,
        repeats=_REPEATS,
    )
    student, teacher = (statistics.median(t.step_s for t in timings[who]) for who in ("student", "teacher"))
    return student / teacher


def pass_costs(evaluation: EvaluationContext, asked: Sequence[TokenPrompt], most: int) -> PassCosts:
    """Costs of the student's step, and of the teacher's passes over up to `most` drafts, or more, behind a prompt."""
    widths = range(1, max(most, _MOST_DRAFTS) + 2)
    ids = max((prompt.ids for prompt in asked), key=len)
    timed = timed_passes(
        evaluation.teacher.model,
        # The longest pass ends where the prompt does, which is known to fit.
        ids[: max(1, len(ids) - widths[-1])],
        widths=widths,
        repeats=_PASSES,
    )
    pass_s = {width: statistics.median(seconds) for width, seconds in timed.items()}
    return PassCosts(draft_s=cost_ratio(evaluation, asked) * pass_s[1], pass_s=pass_s)


def in_turns(
    evaluation: EvaluationContext, asked: Sequence[TokenPrompt], sampling: Sampling, draft_tokens: int
) -> list[Drafted]:
    """Each prompt, answered by the teacher alone and with the student drafting, in turns."""
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
        by_position=tally.by_position,
    )
