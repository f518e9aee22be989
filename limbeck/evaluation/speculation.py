"""Speculative decoding with the student as the teacher's draft: measured metrics, and the theory's expectation.

With a the chance that a drafted token stands, g drafted tokens for each pass of the teacher, and c what a step of the
student costs in steps of the teacher (Leviathan et al. 2023, arXiv:2211.17192):

    tokens per pass   (1 - a^(g + 1)) / (1 - a)                    equation 1
    speed-up        (1 - a^(g + 1)) / ((1 - a) (g c + 1))        theorem 3.8

Both take every draft to stand with the same chance, whatever became of the others, and a pass of the teacher over
g + 1 tokens to cost what a pass over one costs. Neither holds exactly, so what was measured stands beside them, and
`PassCosts` puts the measured cost of a pass of that width in the place of one step of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        by_position: of the first, second, ... draft of the rounds: how many stand, and how many were looked at.
    """

    id: str
    passes: int
    tokens: int
    accepted: int
    rejected: int
    alone_s: float
    alone_tokens: int
    drafted_s: float
    by_position: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """Measured seconds of the two models, one sequence at a time.

    Attributes:
        draft_s: a step of the student, which drafts one token.
        pass_s: a pass of the teacher, by the number of tokens it reads; 1 is its step without a draft.
    """

    draft_s: float
    pass_s: Mapping[int, float]

    @property
    def ratio(self) -> float:
        """A step of the student in steps of the teacher."""
        return self.draft_s / self.pass_s[1]

    def round(self, draft_tokens: int) -> float:
        """Seconds of so many drafts and the pass that reads them, in steps of the teacher alone."""
        return (draft_tokens * self.draft_s + self.pass_s[draft_tokens + 1]) / self.pass_s[1]

    def speedup(self, acceptance: float, draft_tokens: int) -> float:
        """Tokens per pass that are expected, over what a round costs."""
        return expected_tokens_per_pass(acceptance, draft_tokens) / self.round(draft_tokens)

    def best(self, acceptance: float) -> int:
        """The number of drafted tokens with the largest expected speed-up, 0 where none reaches 1."""
        speedups = {width - 1: self.speedup(acceptance, width - 1) for width in self.pass_s if width > 1}
        best = max(speedups, key=lambda draft_tokens: speedups[draft_tokens])
        return best if speedups[best] > 1 else 0

    def break_even(self, draft_tokens: int) -> float | None:
        """The acceptance at which such a round costs exactly what it saves; None where not even 1 would pay."""
        return _least_share(draft_tokens, self.round(draft_tokens))


def position_rows(prompts: Sequence[Drafted]) -> dict[int, list[ScoredRow]]:
    """Rows of the acceptance of the first, second, ... draft of a round (from 1), of the prompts that came so far."""
    places = max((len(p.by_position) for p in prompts), default=0)
    return {
        place + 1: [
            ScoredRow(
                id=p.id, weight=1.0, values={}, sums={"draft_acceptance": tuple(map(float, p.by_position[place]))}
            )
            for p in prompts
            if len(p.by_position) > place
        ]
        for place in range(places)
    }


def acceptance_rows(
    prompts: Sequence[Drafted], *, draft_tokens: int | None = None, costs: PassCosts | None = None
) -> list[ScoredRow]:
    """A row per prompt with its part of the sums that `limbeck.evaluation.scores.pooled` makes the metrics of.

    Args:
        draft_tokens: of a round, for the expected speed-up, which is left out without it.
        costs: of the passes of both models, likewise.
    """
    rows = []
    for p in prompts:
        sums: dict[str, tuple[float, ...]] = {
            "draft_acceptance": (float(p.accepted), float(p.accepted + p.rejected)),
            "tokens_per_pass": (float(p.tokens), float(p.passes)),
            "speculative_speedup": (p.alone_s, float(p.alone_tokens), p.drafted_s, float(p.tokens)),
        }
        if draft_tokens is not None and costs is not None:
            per_row = (1.0, float(draft_tokens), costs.round(draft_tokens))
            sums["expected_speedup"] = (*sums["draft_acceptance"], *per_row)
        rows.append(ScoredRow(id=p.id, weight=1.0, values={}, sums=sums))
    return rows


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

    Raises:
        LimbeckError: as `expected_tokens_per_pass`.
    """
    return _least_share(draft_tokens, draft_tokens * cost_ratio + 1)


def _least_share(draft_tokens: int, cost: float) -> float | None:
    """The least acceptance that gives as many tokens per pass as a round costs steps of the teacher.

    By bisection, to the last bit: the tokens grow with the acceptance.
    """
    if expected_tokens_per_pass(1.0, draft_tokens) / cost < 1:
        return None
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        below = expected_tokens_per_pass(middle, draft_tokens) / cost < 1
        low, high = (middle, high) if below else (low, middle)
    return high
