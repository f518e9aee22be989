"""The alarm of a training whose loss climbs away from its best, for trainings on responses that never change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.rollouts.alarms import LOSS_CLIMBS, OFF_POLICY_ALARMS
from limbeck.rollouts.monitor import Alarm

# A running mean over some ten steps: single batches differ by a third, their mean by a tenth.
GAIN = 0.2
# Steps that make the first level, and steps before which no alarm goes off.
START, QUIET = 5, 10
# Half above the lowest level, and by a tenth of a nat: four standard deviations of the level and more.
CLIMB, LEAST = 1.5, 0.1
# Well again below this; between the two an alarm stays as it is.
WELL = 1.2


@dataclass(slots=True)
class LossAlarm:
    """Alarm on a rising loss; goes off once, and again only after the loss came down in between.

    Plain numbers: what it says depends on what it has seen alone, so a resumed run repeats it. It reads the forward KL
    at temperature 1 where that is measured beside the loss, since a temperature that moves changes the loss too.
    """

    seen: int = 0
    level: float = 0.0
    low: float = 0.0
    low_step: int = 0
    on: bool = False

    def see(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Take in the metrics of a step, and give the alarm if it goes off by them."""
        key = "forward_kl" if "forward_kl" in metrics else "loss"
        value = metrics.get(key)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return []
        self.seen += 1
        if self.seen <= START:
            self.level += (value - self.level) / self.seen
        else:
            self.level += GAIN * (value - self.level)
        if self.seen <= START or self.level < self.low:
            self.low, self.low_step = self.level, metrics["step"]
        climbed = self.level > CLIMB * self.low and self.level > self.low + LEAST
        if self.on:
            self.on = self.level > WELL * self.low
            return []
        if self.seen < QUIET or not climbed:
            return []
        self.on = True
        seen = f"{key} is {self.level:.3g}, smoothed, and was {self.low:.3g} at step {self.low_step}"
        return [Alarm(name=LOSS_CLIMBS, message=f"{LOSS_CLIMBS}: {seen}; {OFF_POLICY_ALARMS[LOSS_CLIMBS].remedy}")]

    def state(self) -> dict[str, Any]:
        """All that it remembers, for JSON."""
        return asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` gave, and nothing else."""
        for name, value in state.items():
            setattr(self, name, value)
