"""Speculative decoding with the student as the teacher's draft: measured metrics, and the theory's expectation.

With a the chance that a drafted token stands, g drafted tokens for each pass of the teacher, and c what a step of the
student costs in steps of the teacher (Leviathan et al. 2023, arXiv:2211.17192):

    tokens per pass   (1 - a^(g + 1)) / (1 - a)                    equation 1
    speed-up        (1 - a^(g + 1)) / ((1 - a) (g c + 1))        theorem 3.8

Both take every draft to stand with the same chance, whatever became of the others, and a pass of the teacher over
g + 1 tokens to cost what a pass over one costs. Neither holds exactly, so the measured figures stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.types import LimbeckError, ScoredRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """One prompt, answered by the teacher alone and with the draft.

    Attributes:
        passes: of the teacher with the draft.
        tokens: written with the draft.
        accepted, rejected: drafts that stand, and that were replaced; what was drafted behind a rejected one was never
            looked at.
        alone_s, alone_tokens: seconds and tokens of the teacher alone.
        drafted_s: seconds with the draft.
    """

    id: str
    passes: int
    tokens: int
    accepted: int
    rejected: int
    alone_s: float
    alone_tokens: int
    drafted_s: float


def acceptance_rows(prompts: Sequence[Drafted]) -> list[ScoredRow]:
    """A row per prompt with its part of the sums that `limbeck.evaluation.scores.pooled` makes the metrics of."""
    return [
        ScoredRow(
            id=p.id,
            weight=1.0,
            values={},
            sums={
                "draft_acceptance": (float(p.accepted), float(p.accepted + p.rejected)),
                "tokens_per_pass": (float(p.tokens), float(p.passes)),
                "speculative_speedup": (p.alone_s, float(p.alone_tokens), p.drafted_s, float(p.tokens)),
            },
        )
        for p in prompts
    ]


def expected_tokens_per_pass(acceptance: float, draft_tokens: int) -> float:
    """(1 - a^(g + 1)) / (1 - a): from 1 (no draft stands) to g + 1 (all do).

    Raises:
        LimbeckError: an acceptance outside [0, 1], or no draft tokens.
    """
    if not 0 <= acceptance <= 1 or draft_tokens < 1:
        raise LimbeckError(
            f"acceptance is {acceptance} and draft_tokens {draft_tokens}, expected a share in [0, 1] and at least 1 "
            "token: correct evaluate.groups.speculation.draft_tokens"
        )
    # The sum, not the quotient: near a = 1 that is a difference of equal numbers over another.
    return sum(acceptance**k for k in range(draft_tokens + 1))


def expected_speedup(acceptance: float, draft_tokens: int, cost_ratio: float) -> float:
    """Theorem 3.8: expected tokens per pass, over what a pass with its drafts costs in steps of the teacher.

    Raises:
        LimbeckError: as `expected_tokens_per_pass`.
    """
    return expected_tokens_per_pass(acceptance, draft_tokens) / (draft_tokens * cost_ratio + 1)


def break_even(draft_tokens: int, cost_ratio: float) -> float | None:
    """The acceptance at which drafting costs exactly what it saves; None where not even perfect drafts would pay.

    By bisection, to the last bit: the speed-up grows with the acceptance.

    Raises:
        LimbeckError: as `expected_tokens_per_pass`.
    """
    if expected_speedup(1.0, draft_tokens, cost_ratio) < 1:
        return None
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        below = expected_speedup(middle, draft_tokens, cost_ratio) < 1
        low, high = (middle, high) if below else (low, middle)
    return high
