"""Progress of a training: the content of a checkpoint beside weights and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from limbeck.types import Response


@dataclass(frozen=True)
class Best:
    """The lowest loss per token on the set-aside responses, and the step after which it was measured."""

    step: int
    loss: float


@dataclass
class Progress:
    """Counters and measurements of a training; all but the last two fields are in the checkpoint.

    Attributes:
        gaps: sums and counts of the gaps by writer over the epochs that a rule measures its reference in.
        validations: how often the held-out loss was measured for the response source.
        heldout_loss: its last value.
        so_far: counts since the first step; see `limbeck.rollouts.account`.
        learning_rate: the peak that a search found; None where the recipe gives it.
        first_loss: the loss on the set-aside responses before training.
        best: the lowest loss on the set-aside responses.
        since_gain: measurements of that loss in a row that were not lower than the lowest.
        saved: step of the newest checkpoint.
        now: the step and its responses, so that they are written once.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gaps: dict[str, list[float]] = field(default_factory=dict)
    validations: int = 0
    heldout_loss: float | None = None
    so_far: dict[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    first_loss: float | None = None
    best: Best | None = None
    since_gain: int = 0
    saved: int = 0
    now: tuple[int, dict[int, Response]] = (-1, {})

    def measure_gaps(self, found: Mapping[str, tuple[float, float]]) -> None:
        """Add the sums and counts of a step."""
        for name in ("gap/teacher", "gap/student"):
            earlier, now = self.gaps.get(name, [0.0, 0.0]), found.get(name, (0.0, 0.0))
            self.gaps[name] = [earlier[0] + now[0], earlier[1] + now[1]]

    @property
    def reference(self) -> tuple[float, float] | None:
        """The mean gaps of the teacher's and the student's responses; None before any was measured."""
        if not self.gaps:
            return None
        theirs, own = (self.gaps.get(name, [0.0, 0.0]) for name in ("gap/teacher", "gap/student"))
        return theirs[0] / max(theirs[1], 1.0), own[0] / max(own[1], 1.0)

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON-able."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "gaps": self.gaps,
            "validations": self.validations,
            "heldout_loss": self.heldout_loss,
            "so_far": self.so_far,
            "learning_rate": self.learning_rate,
            "first_loss": self.first_loss,
            "best": None if self.best is None else asdict(self.best),
            "since_gain": self.since_gain,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """The progress in a checkpoint's state.json."""
        return cls(
            step=state["step"],
            tokens=state["tokens"],
            seconds=state["seconds"],
            gaps=state["gaps"],
            validations=state["validations"],
            heldout_loss=state["heldout_loss"],
            so_far=state["so_far"],
            learning_rate=state["learning_rate"],
            first_loss=state["first_loss"],
            best=None if state["best"] is None else Best(**state["best"]),
            since_gain=state["since_gain"],
            saved=state["step"],
        )
