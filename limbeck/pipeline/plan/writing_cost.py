"""Time that a model takes to write answers, from a few steps that were timed.

A step writes one token of each answer that is not finished. It takes some time however many there are, some for each of
them, and some for each key of each that attention reads, so that long answers cost more by the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """One step of writing.

    Attributes:
        rows: answers that were being written.
        keys: tokens before the one that is written, of each row.
    """

    rows: int
    keys: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class WritingCost:
    """Seconds of writing.

    Attributes:
        prompt: of each token of a prompt.
        step, row, key: of a step, of each answer in it, and of each key of each answer.
    """

    prompt: float
    step: float
    row: float
    key: float

    @classmethod
    def of(cls, prompt: float, steps: Sequence[TimedStep]) -> WritingCost:
        """The least squares of relative errors through timed steps, without a negative term."""
        features_NF = torch.tensor([[1.0, s.rows, s.rows * s.keys] for s in steps], dtype=torch.float64)
        seconds_N = torch.tensor([s.seconds for s in steps], dtype=torch.float64).clamp_min(1e-9)
        scaled_NF = features_NF / seconds_N[:, None]
        kept = [0, 1, 2]
        found: dict[int, float] = {}
        while kept:
            part_NF = scaled_NF[:, kept]
            largest_F = part_NF.abs().amax(0)
            answer_F = torch.linalg.lstsq(part_NF / largest_F, torch.ones(len(steps), 1).double(), driver="gelsd")
            values = (answer_F.solution[:, 0] / largest_F).tolist()
            found = dict(zip(kept, values, strict=True))
            negative = min(found, key=lambda term: found[term])
            if found[negative] >= 0:
                break
            kept.remove(negative)
        step, row, key = (found.get(term, 0.0) for term in range(3))
        return cls(prompt=prompt, step=step, row=row, key=key)

    def seconds(self, count: float, prompt: float, alive: Sequence[float], *, at_once: int) -> float:
        """Seconds for so many answers.

        Args:
            prompt: tokens of a prompt.
            alive: share of the answers that have a token of each place.
            at_once: answers that are written together; the last batch has the rest.
        """
        whole, rest = divmod(max(count, 0.0), at_once)
        return whole * self._batch(at_once, prompt, alive) + self._batch(rest, prompt, alive)

    def _batch(self, rows: float, prompt: float, alive: Sequence[float]) -> float:
        """Seconds for answers that are written together; they end one by one."""
        found = self.prompt * prompt * rows
        for place, share in enumerate(alive):
            found += self.step * (1 - (1 - share) ** rows) + rows * share * (self.row + self.key * (prompt + place))
        return found


def alive_of(lengths: Sequence[int]) -> tuple[float, ...]:
    """Share of answers of these lengths that have a token of each place."""
    ends = [0] * (max(lengths, default=0) + 1)
    for length in lengths:
        ends[length] += 1
    left, found = len(lengths), []
    for ended in ends[:-1]:
        left -= ended
        found.append(left / len(lengths))
    return tuple(found)


def alive_by_ends(ended: int, tokens: int, most: int) -> tuple[float, ...]:
    """The same where as many answers ended in so many tokens, as if each token were as likely to be the last."""
    stays = 1 - ended / max(tokens, 1)
    return tuple(stays**place for place in range(most))
