"""Search for the learning rate: short trainings at several rates, each undone, and the best of them.

A trial trains some steps at one rate, measures the loss on training responses that its steps did not use, and puts the
weights back. Rates half a decade apart are tried upwards or downwards from a guess until the loss is worse on both
sides of the best one (a range test, cf. Smith 2017, arXiv 1506.01186, by whole trials instead of by one ramp, so that
trials can be compared). Trials are kept on disk one by one: a search that was killed goes on with the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from limbeck.runtime.files import write_json
from limbeck.runtime.records import read_fields

if TYPE_CHECKING:
    from accelerate import Accelerator

# Optimizer steps of a trial: warm-up, then level, then a fall to zero, which shows what the rate is worth once it is
# annealed. Fewer steps see only noise; more cost more than they are worth.
TRIAL_STEPS, WARMUP_STEPS, FALLING_STEPS = 12, 3, 4
# Half a decade between rates: the loss after a training is flat within that around its best.
RATIO = math.sqrt(10)
LOWEST, HIGHEST = 1e-7, 1e-1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A learning rate and the loss after its steps; infinite where the loss or a gradient was not finite."""

    learning_rate: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class RateSearch:
    """Result of a search.

    Attributes:
        metric: name of the losses: `loss` of the objective, per token, or `forward_kl` beside it.
        before: the loss of the student as it begins.
        chosen: the learning rate to train with; None while trials are missing.
    """

    metric: str
    before: float
    trials: tuple[Trial, ...] = ()
    chosen: float | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON, in one piece. Infinite losses are null."""
        record = asdict(self)
        record["trials"] = [
            {"learning_rate": t.learning_rate, "loss": t.loss if math.isfinite(t.loss) else None} for t in self.trials
        ]
        write_json(path, record)

    @classmethod
    def read(cls, path: Path) -> RateSearch | None:
        """Search that `write` wrote; None where there is none."""
        if not path.exists():
            return None
        record: dict[str, Any] = read_fields(path, {"metric": str, "before": (int, float), "trials": list})
        trials = tuple(
            Trial(learning_rate=t["learning_rate"], loss=math.inf if t["loss"] is None else t["loss"])
            for t in record["trials"]
        )
        return cls(**{**record, "trials": trials})


def trial_factors() -> list[float]:
    """The share of its learning rate that each step of a trial takes."""
    rising = [(i + 1) / WARMUP_STEPS for i in range(WARMUP_STEPS)]
    falling = [1 - i / FALLING_STEPS for i in range(FALLING_STEPS)]
    return rising + [1.0] * (TRIAL_STEPS - WARMUP_STEPS - FALLING_STEPS) + falling


def first_guess(width: int, *, adapters: bool) -> float:
    """First rate of a search: 3e-4 at the width of 576 and less in wider models; adapters take ten times as much."""
    return 3e-4 * min(1.0, 576 / width) * (10 if adapters else 1)


def next_rate(guess: float, before: float, trials: Sequence[Trial]) -> float | None:
    """The rate to try next; None when the best rate lies between two that are worse, or at an end.

    Args:
        before: a trial that ends above this has harmed the student; the search then goes down.
    """
    tried = {_place(t.learning_rate, guess): t.loss for t in trials}
    if 0 not in tried:
        return guess
    helpful = {place: loss for place, loss in tried.items() if loss < before}
    # All that was tried did harm: far lower rates are left.
    best = min(helpful, key=helpful.__getitem__) if helpful else min(tried)
    candidates = (best - 1,) if not helpful else (best + 1, best - 1)
    for place in candidates:
        rate = guess * RATIO**place
        if place not in tried and LOWEST <= rate <= HIGHEST:
            return rate
    return None


def best_rate(guess: float, before: float, trials: Sequence[Trial]) -> float:
    """The lowest point of the parabola through the best trial and its neighbours, over the logarithm of the rate.

    Where a neighbour is missing or did harm beyond measure, the best trial itself. Where every trial did harm, the
    lowest rate tried.
    """
    tried = {_place(t.learning_rate, guess): t.loss for t in trials}
    helpful = {place: loss for place, loss in tried.items() if loss < before}
    if not helpful:
        return guess * RATIO ** min(tried)
    best = min(helpful, key=helpful.__getitem__)
    left, mid, right = (tried.get(best + i, math.inf) for i in (-1, 0, 1))
    # A neighbour that did harm says only that the best lies before it, not where.
    right = min(right, before)
    bend = left - 2 * mid + right
    if not (math.isfinite(bend) and bend > 0):
        return guess * RATIO**best
    shift = max(-0.5, min(0.5, (left - right) / (2 * bend)))
    return guess * RATIO ** (best + shift)


class Trials(Protocol):
    """Trials of rates; see `limbeck.training.rate_trials`."""

    def before(self) -> float:
        """The loss of the student as it begins."""
        ...

    def try_rate(self, rate: float) -> float:
        """The loss after a trial at a rate; the student is then as before."""
        ...


def search(
    path: Path,
    *,
    metric: str,
    guess: float,
    trials: Callable[[], Trials],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> RateSearch:
    """The search kept at `path`: finished trials are read, missing ones are run.

    Args:
        trials: makes what tries rates; not called where the search is over already.
        accelerator: its processes try the same together; the first one keeps the trials.
    """
    found = _of_the_first(RateSearch.read(path) if accelerator.is_main_process else None)
    if found is not None and found.chosen is not None:
        return found
    tried = trials()
    if found is None:
        found = RateSearch(metric=metric, before=tried.before())
    while found.chosen is None:
        rate = next_rate(guess, found.before, found.trials)
        if rate is None:
            chosen = float(f"{best_rate(guess, found.before, found.trials):.3g}")
            found = replace(found, chosen=chosen)
        else:
            loss = tried.try_rate(rate)
            say(f"learning rate {rate:.2g}: {metric} {found.before:.4g} -> {loss:.4g} in {TRIAL_STEPS} steps")
            found = replace(found, trials=(*found.trials, Trial(learning_rate=rate, loss=loss)))
        if accelerator.is_main_process:
            found.write(path)
    return found


def _of_the_first(found: RateSearch | None) -> RateSearch | None:
    """Value of the first process, in all of them."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([found])[0]


def _place(rate: float, guess: float) -> int:
    """Number of half decades that a rate is above the guess."""
    return round(math.log(rate / guess, RATIO))
