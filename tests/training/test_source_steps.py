"""What the loop owes to whoever writes: it asks once a step, and a round begins with a sound student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from limbeck.objectives import build_objective
from limbeck.rollouts.sources import OfflineSource, SourceContext, StepCounter
from limbeck.training.run import NonFiniteError
from limbeck.types import LimbeckError, Response
from tests.training.play import play, settings, tiny_model, tiny_responses


class Counting(OfflineSource):
    """A supply whose state is how often it was asked; it begins rounds before some steps, and fails at one."""

    def __init__(self, source_context: SourceContext, *, rounds: tuple[int, ...] = (), fails: int = -1):
        super().__init__(tiny_responses(), source_context)
        self.taken, self.rounds, self.fails = 0, rounds, fails

    def step(self, clock: StepCounter) -> dict[int, Response]:
        if clock.step == self.fails:
            raise LimbeckError("the model's logits are NaN")
        self.taken += 1
        return super().step(clock)

    def starts_round(self, clock: StepCounter) -> bool:
        return clock.step in self.rounds

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]


def counted(folder: Path, *, objective: str = "fkl", changes: Mapping[str, Any] | None = None, **how: Any) -> Counting:
    """A run of five steps, and the supply as it is at its end."""
    made: list[Counting] = []

    def author(source_context: SourceContext) -> Counting:
        made.append(Counting(source_context, **how))
        return made[0]

    play(tiny_model(1), folder, settings(**(changes or {})), author=author, objective=build_objective(objective))
    return made[0]


@pytest.mark.parametrize("objective", ["fkl", "hidden"])
def test_a_look_at_the_first_step_is_no_step(tmp_path, objective):
    """The projection of an objective on hidden states is made from a response before the training begins."""
    assert counted(tmp_path, objective=objective).taken == 5


def test_a_round_begins_with_a_checkpoint_that_is_not_written_twice(tmp_path):
    counted(tmp_path, rounds=(0, 1, 2, 3, 4), changes={"save_steps": 2, "save_total_limit": 9})
    folders = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    assert sorted(folders) == [f"step-{step:06d}" for step in range(1, 5)]
    # The run continues from the last one and has nothing to write before the step that is left.
    counted(tmp_path, rounds=(4,), changes={"save_total_limit": 9})
    assert folders == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}


BEYOND = {"learning_rate": 1e30, "warmup_steps": 0}


def test_a_ruined_student_begins_no_round(tmp_path):
    with pytest.raises(NonFiniteError, match="step 1: after the update"):
        counted(tmp_path, rounds=(1,), changes=BEYOND)
    assert not (tmp_path / "checkpoints").exists()


def test_a_writer_that_fails_on_a_ruined_student_names_the_step(tmp_path):
    with pytest.raises(NonFiniteError, match="step 1: after the update"):
        counted(tmp_path, fails=1, changes=BEYOND)
    with pytest.raises(LimbeckError, match="the model's logits are NaN"):
        counted(tmp_path, fails=1)
