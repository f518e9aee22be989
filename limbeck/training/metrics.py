"""Logging of a training: metrics, alarms, some responses, and trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.rollouts.monitor import Watch
from limbeck.runtime.console import Console, QuietConsole
from limbeck.runtime.files import write_text
from limbeck.training.loss_alarm import LossAlarm
from limbeck.types import LimbeckError, Response

if TYPE_CHECKING:
    from accelerate import Accelerator

# Prompts whose responses are kept for the report.
EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class LoopContext:
    """Destinations of the loop's reports, and its stop request.

    Attributes:
        checkpoints: folder for checkpoints.
        metrics: JSON lines, one per logging step.
        learning_rate: JSON file of the search, where the recipe leaves the learning rate to it.
        examples: JSON lines of some responses over the training, where the student writes too.
        console: where progress is shown.
        should_stop: asked after each step; True writes a checkpoint and raises `Interrupted`.
        pause_at: share of the steps after which the loop stops in the same way; at the end it does not.
        label: name of the progress bar.
    """

    checkpoints: Path
    metrics: Path
    learning_rate: Path
    examples: Path | None = None
    console: Console = field(default_factory=QuietConsole)
    should_stop: Callable[[], bool] = lambda: False
    pause_at: float | None = None
    tracker_config: dict[str, Any] = field(default_factory=dict)
    run_name: str = "limbeck"
    label: str = "train"


@dataclass(frozen=True, kw_only=True)
class Journal:
    """Writes metrics.jsonl, examples.jsonl and the trackers; raises alarms.

    Attributes:
        watched: ids of the prompts whose responses are kept, the same over the whole training.
    """

    accelerator: Accelerator
    context: LoopContext
    authored: bool
    watched: frozenset[str]
    watch: Watch = field(default_factory=Watch)
    loss_alarm: LossAlarm = field(default_factory=LossAlarm)

    def record(self, metrics: dict[str, Any], by_row: Mapping[int, Response], *, due: bool) -> None:
        """The metrics of a finished step where they are due, or an alarm went off."""
        alarms = self.watch.see(metrics) if self.authored else self.loss_alarm.see(metrics)
        if alarms:
            metrics["warnings"] = [alarm.name for alarm in alarms]
        due = due or bool(alarms)
        if self.accelerator.is_main_process:
            for alarm in alarms:
                self.context.console.warn(f"step {metrics['step']}: {alarm.message}")
            if due:
                _append(self.context.metrics, [metrics])
            if self.authored and self.context.examples is not None:
                kept = [_example(r, metrics) for r in by_row.values() if r.prompt_id in self.watched]
                _append(self.context.examples, kept)
        if due:
            numbers = {key: value for key, value in metrics.items() if key not in ("step", "warnings")}
            self.accelerator.log(numbers, step=metrics["step"])

    def state(self) -> dict[str, Any]:
        """State of the alarms, for a checkpoint."""
        return {"watch": self.watch.state(), "loss_alarm": self.loss_alarm.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.watch.restore(state["watch"])
        self.loss_alarm.restore(state["loss_alarm"])

    def rewind(self, step: int) -> None:
        """Drop the lines of steps that are done again."""
        if self.accelerator.is_main_process:
            for path in (self.context.metrics, self.context.examples):
                if path is not None:
                    _keep_lines(path, step)


def _example(response: Response, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": metrics["step"],
        "epoch": metrics["epoch"],
        "id": response.id,
        "author": response.author,
        "prompt_id": response.prompt_id,
        "prompt_ids": response.prompt_ids,
        "response_ids": response.response_ids,
        "stop": response.stop,
    }


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def _keep_lines(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, LookupError, TypeError, RecursionError):
            # A killed process may leave half a last line; it belongs to a step that is done again.
            if number < len(lines):
                raise LimbeckError(
                    f"{path}:{number} is damaged; delete the line and run the same command again"
                ) from None
    write_text(path, "".join(line + "\n" for line in kept))
