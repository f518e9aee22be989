"""DistiLLM's adaptive off-policy use of the student's responses: a replay buffer and a share that grows when needed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.rollouts.asked import lengths_of
from limbeck.rollouts.io import fields_of, response_from_json
from limbeck.rollouts.sources import MAX_PREVIEW_STEPS, OfflineSource, StepCounter, die, first_steps, longest_first
from limbeck.rollouts.student import StudentSource
from limbeck.types import LimbeckError, Response

# Bytes of a token in a buffered response: an int object and its place in a tuple, generously.
TOKEN_BYTES = 40


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Settings of replay: how often the student writes and how its responses are used (arXiv 2402.03898, Algorithm 1).

    Attributes:
        share: phi at the start, the probability that a step trains on the student's responses. The authors' scripts
            have 0 (GPT-2, OPT) and 0.2 (OpenLLaMA).
        capacity: responses the buffer holds; the oldest leave first.
        decay: how often fresh ones are written over training: with probability phi * (1 - t/T), phi / 2 or phi * t/T.
        tolerance: phi grows when the held-out loss is by so much above what it is compared with.
        bump: by how much.
        compare_with: what the held-out loss was when phi grew last (at the start, until then), as in the authors' code;
            or the lowest it has been since then.
        validation_steps: steps from one measurement of the held-out loss to the next; None is an epoch.
    """

    share: float = 0.2
    capacity: int = 1000
    decay: Literal["decreasing", "constant", "increasing"] = "decreasing"
    tolerance: float = 0.1
    bump: float = 0.1
    compare_with: Literal["last_growth", "lowest"] = "last_growth"
    validation_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise LimbeckError(f"share is {self.share}: expected a probability from 0 to 1")

    def fresh(self, phi: float, clock: StepCounter) -> float:
        """Probability that a step writes fresh responses."""
        return phi * {"decreasing": 1 - clock.progress, "constant": 0.5, "increasing": clock.progress}[self.decay]


class ReplaySource:
    """Each step trains on fresh responses of the student (which enter the buffer), on buffered ones, or on fixed ones.

    The held-out loss is measured before training and every so many steps. While the buffer is not full, every step that
    would draw from it writes instead. All ranks draw the same random numbers and hold the same buffer.
    """

    wants_validation = True

    def __init__(self, own: StudentSource, base: OfflineSource, settings: ReplaySettings, *, step_rows: int, seed: int):
        self.own, self.base, self.settings, self.step_rows, self.seed = own, base, settings, step_rows, seed
        self.phi, self.loss, self.latest = settings.share, None, None
        self.done = {"replayed": 0, "validations": 0, "rises": 0, "growths": 0}
        self.buffer: deque[Response] = deque(maxlen=settings.capacity)
        longest = int(lengths_of(own.asked).max()) + own.rollout.sampling.max_new_tokens
        require_room(settings.capacity, longest)

    @property
    def prompts(self) -> frozenset[str]:
        return self.own.prompts | self.base.prompts

    @property
    def steps_per_epoch(self) -> int:
        return self.base.steps_per_epoch

    @property
    def validation_steps(self) -> int:
        return self.settings.validation_steps or self.steps_per_epoch

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return first_steps(self, min(count, MAX_PREVIEW_STEPS), total)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        draw = die(self.seed, clock.step)
        r, full = draw.random(), len(self.buffer) == self.buffer.maxlen
        if r < self.settings.fresh(self.phi, clock) or (r < self.phi and not full):
            fresh = self.own.step(clock)
            self.buffer.extend(fresh.values())
            return fresh
        if r < self.phi:
            again = draw.sample(list(self.buffer), min(self.step_rows, len(self.buffer)))
            self.done["replayed"] += len(again)
            return longest_first(again)
        return self.base.step(clock)

    def starts_round(self, clock: StepCounter) -> bool:
        return False

    def validated(self, loss: float) -> None:
        """Take in the held-out loss; phi grows where it is above an earlier one by more than the tolerance."""
        if self.loss is None or self.latest is None:
            self.loss = self.latest = loss
            return
        self.done["validations"] += 1
        self.done["rises"] += loss > self.latest
        self.latest = loss
        if loss > self.loss + self.settings.tolerance:
            self.done["growths"] += self.phi < 1
            self.phi, self.loss = min(self.phi + self.settings.bump, 1.0), loss
        elif self.settings.compare_with == "lowest":
            self.loss = min(self.loss, loss)

    def metrics(self, clock: StepCounter) -> dict[str, float]:
        return {"share": self.phi, "buffer": float(len(self.buffer))}

    def counts(self, clock: StepCounter) -> dict[str, float]:
        return {name: float(count) for name, count in self.done.items()}

    def state(self) -> dict[str, Any]:
        return {
            "phi": self.phi,
            "loss": self.loss,
            "latest": self.latest,
            "done": dict(self.done),
            "buffer": [fields_of(r) for r in self.buffer],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.phi, self.loss, self.latest = state["phi"], state["loss"], state["latest"]
        self.done = dict(state["done"])
        self.buffer.clear()
        self.buffer.extend(response_from_json(fields) for fields in state["buffer"])
        self.own.restore({})


def require_room(capacity: int, longest: int) -> None:
    """Refuse a buffer that cannot be held.

    Raises:
        LimbeckError: it would take more than this machine has.
    """
    wanted = capacity * longest * TOKEN_BYTES
    if not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise LimbeckError(
            f"a buffer of {capacity} responses of up to {longest} tokens takes {wanted >> 30} GiB and this machine has "
            f"{there >> 30}; lower responses.source.capacity"
        )
