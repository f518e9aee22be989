"""Monitoring of on-policy training: smooths the metrics of the steps and raises alarms.

Pure Python over numbers: what it says depends on what it has seen alone, so a resumed run repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.rollouts import alarms
from limbeck.rollouts.alarms import (
    ALARMS,
    COUNT,
    EMPTY,
    ENGINE_GAP,
    ENGINE_GAP_LIMIT,
    LENGTH,
    LOG_Q,
    REPEATED,
    TRUNCATED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """An alarm. Its message is one line: the value, the baseline, and the remedy."""

    name: str
    message: str


@dataclass(slots=True)
class _Level:
    """A metric, smoothed. `start` is the mean of its first values, `low` and `high` what the level was since then.

    Attributes:
        beside: of the tail of the divergence alone, the level of its mean when the tail was lowest.
    """

    seen: int = 0
    mean: float = 0.0
    start: float = 0.0
    low: float = 0.0
    high: float = 0.0
    beside: float = 0.0

    def add(self, value: float, gain: float) -> None:
        self.seen += 1
        if self.seen <= alarms.START:
            self.start += (value - self.start) / self.seen
            self.mean = self.low = self.high = self.start
        else:
            self.mean += gain * (value - self.mean)
            self.low, self.high = min(self.low, self.mean), max(self.high, self.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """Whether a level is bad, whether it is well again (between the two an alarm stays as it is), and both in words."""

    bad: bool
    well: bool
    seen: str


_Levels = Mapping[str, _Level]


def _measured(levels: _Levels, key: str) -> _Level | None:
    """The verdict on a metric that has enough values."""
    level = levels.get(key)
    return level if level and level.seen >= alarms.QUIET else None


def _repetition(levels: _Levels) -> _Verdict | None:
    if not (level := _measured(levels, REPEATED)):
        return None
    rise, late = level.mean - level.low, level.seen >= alarms.PATIENCE
    return _Verdict(
        bad=rise > alarms.REPEATED_RISE or (late and level.mean > alarms.REPEATED_MOST),
        well=rise < alarms.REPEATED_WELL and level.mean < alarms.REPEATED_MOST - alarms.REPEATED_WELL,
        seen=f"{level.mean:.0%} of the student's responses loop, {level.low:.0%} when it was best",
    )


def _truncation(levels: _Levels) -> _Verdict | None:
    if not (level := _measured(levels, TRUNCATED)):
        return None
    return _Verdict(
        bad=level.mean > alarms.TRUNCATED_MOST,
        well=level.mean < alarms.TRUNCATED_WELL,
        seen=f"{level.mean:.0%} of the student's responses end at max_new_tokens, {level.start:.0%} at the start",
    )


def _length_drift(levels: _Levels) -> _Verdict | None:
    if not (level := _measured(levels, LENGTH)):
        return None
    factor = max(level.mean, level.start) / max(min(level.mean, level.start), 1e-9)
    return _Verdict(
        bad=factor > alarms.LENGTH_FACTOR,
        well=factor < alarms.LENGTH_WELL,
        seen=f"the student's responses have {level.mean:.0f} tokens on average, {level.start:.0f} at the start",
    )


def _entropy_collapse(levels: _Levels) -> _Verdict | None:
    student, teacher = _measured(levels, "student_entropy"), levels.get("teacher_entropy")
    if not student or not teacher:
        return None
    return _Verdict(
        bad=student.mean < alarms.ENTROPY_SHARE * min(teacher.mean, student.start),
        well=student.mean > alarms.ENTROPY_WELL * min(teacher.mean, student.start),
        seen=f"the student's entropy is {student.mean:.3g} nats per token, {student.start:.3g} at the start and "
        f"{teacher.mean:.3g} in the teacher",
    )


def _kl_tail(levels: _Levels) -> _Verdict | None:
    tail, mean = _measured(levels, "kl_p99"), _divergence(levels)
    if not tail or not mean:
        return None
    return _Verdict(
        bad=tail.mean > alarms.TAIL_GROWTH * tail.low > 0 and mean.mean < alarms.TAIL_MEAN * tail.beside,
        well=tail.mean < alarms.TAIL_WELL * tail.low,
        seen=f"the 99th percentile of the divergence is {tail.mean:.3g}, {tail.low:.3g} when it was lowest, while the "
        f"mean went from {tail.beside:.3g} to {mean.mean:.3g}",
    )


def _divergence(levels: _Levels) -> _Level | None:
    return levels.get("forward_kl") or levels.get("loss")


def _log_q_collapse(levels: _Levels) -> _Verdict | None:
    if not (level := _measured(levels, LOG_Q)):
        return None
    fall = level.high - level.mean
    return _Verdict(
        bad=fall > alarms.LOG_Q_FALL,
        well=fall < alarms.LOG_Q_WELL,
        seen=f"log q of the student's own responses is {level.mean:.3g} nats per token, {level.high:.3g} at its best",
    )


def _empty(levels: _Levels) -> _Verdict | None:
    if not (level := _measured(levels, EMPTY)):
        return None
    return _Verdict(
        bad=level.mean > alarms.EMPTY_MOST,
        well=level.mean < alarms.EMPTY_WELL,
        seen=f"{level.mean:.0%} of the student's responses are empty, {level.start:.0%} at the start",
    )


def _engine_gap(metrics: Mapping[str, Any]) -> _Verdict | None:
    """The verdict on one round's measurement, which is no average that has to settle first."""
    gap, limit = metrics.get(ENGINE_GAP), metrics.get(ENGINE_GAP_LIMIT)
    if not isinstance(gap, int | float) or not isinstance(limit, int | float):
        return None
    return _Verdict(
        bad=not gap <= limit,
        well=gap <= limit,
        seen=f"log-probabilities of the engine's tokens are {gap:.3g} nats from the student's here on average, and "
        f"rounding explains {limit:g}",
    )


_RULES: Mapping[str, Callable[[_Levels], _Verdict | None]] = {
    "repetition": _repetition,
    "truncation": _truncation,
    "length_drift": _length_drift,
    "entropy_collapse": _entropy_collapse,
    "kl_tail": _kl_tail,
    "log_q_collapse": _log_q_collapse,
    "empty": _empty,
}
_READ = tuple(dict.fromkeys(key for name in _RULES for key in ALARMS[name].keys))
_OF_RESPONSES = (TRUNCATED, REPEATED, LENGTH, EMPTY, LOG_Q)


class Watch:
    """Monitor that reads the metrics of each step and raises the alarms of `ALARMS`.

    An alarm goes off once, and again only after the metric recovered in between. Metrics that a step lacks, or that
    are not finite, are passed over. A watch that is given the `state` of another one goes on as that one would have.
    """

    def __init__(self) -> None:
        self._levels: dict[str, _Level] = {}
        self._on: list[str] = []

    def see(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Take in the metrics of a step, and give the alarms that go off by them.

        Args:
            metrics: as in metrics.jsonl, with those of `health_of`. Steps without responses of the student are passed
                over: on the teacher's text entropies and divergences are other quantities. `kl_p99` is the 99th
                percentile of `forward_kl`, where that is measured, else of `loss`.
        """
        if not metrics.get(COUNT):
            return []
        for key in _READ:
            self._take(key, metrics)
        tail, mean = self._levels.get("kl_p99"), _divergence(self._levels)
        if tail and mean and tail.mean == tail.low:
            tail.beside = mean.mean
        raised = []
        verdicts = {name: rule(self._levels) for name, rule in _RULES.items()}
        for name, verdict in (verdicts | {"engine_gap": _engine_gap(metrics)}).items():
            if verdict and verdict.bad and name not in self._on:
                self._on.append(name)
                raised.append(Alarm(name=name, message=f"{name}: {verdict.seen}; {ALARMS[name].remedy}"))
            elif verdict and verdict.well and name in self._on:
                self._on.remove(name)
        return raised

    def _take(self, key: str, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(key)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return
        level, cut = self._levels.get(key, _Level()), self._levels.get(TRUNCATED)
        if key == LENGTH and level.seen < alarms.START and cut and cut.mean >= alarms.LENGTH_CUT:
            return
        share = min(1.0, metrics[COUNT] / alarms.FULL_STEP) if key in _OF_RESPONSES else 1.0
        level.add(float(value), alarms.ALARM_GAIN * share)
        self._levels[key] = level

    def state(self) -> dict[str, Any]:
        """The state, for JSON."""
        return {"levels": {key: asdict(level) for key, level in self._levels.items()}, "on": list(self._on)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._levels = {key: _Level(**fields) for key, fields in state["levels"].items()}
        self._on = list(state["on"])
