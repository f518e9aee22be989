"""The probe: what it finds, how long it takes, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.models.devices import fleet_of
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.plan import probe as probe_module
from limbeck.pipeline.plan.case import case_of
from limbeck.pipeline.plan.outcome import Plan, plan
from limbeck.pipeline.plan.page import text_of
from limbeck.pipeline.plan.probe import probe
from limbeck.pipeline.plan.workload import workload_of
from limbeck.pipeline.plan.writing_cost import TimedStep, WritingCost, alive_by_ends, alive_of
from limbeck.recipe.load import load_recipe_or_run
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair


class Ticks:
    """A clock that goes on by as much each time that it is read."""

    def __init__(self, tick: float):
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair.write(tmp_path_factory.mktemp("pair"))


def planned(pair: TinyPair, folder: Path, tick: float = 0.01, seconds: float = 3.0, **sections: Any) -> Plan:
    recipe = load_recipe_or_run(str(pair.recipe(folder / "run", **sections)))
    return plan(recipe, fleet_of("cpu"), probe_s=seconds, clock=Ticks(tick))


class TestWritingCost:
    def test_its_terms_are_found_again(self) -> None:
        steps = [
            TimedStep(rows=rows, keys=keys, seconds=0.02 + rows * 0.003 + rows * keys * 1e-5)
            for rows in (2, 8)
            for keys in range(50, 90, 10)
        ]
        cost = WritingCost.of(0.0, steps)
        assert (cost.step, cost.row, cost.key) == pytest.approx((0.02, 0.003, 1e-5), rel=1e-6)

    def test_no_term_is_negative(self) -> None:
        # Later steps were faster, by chance.
        cost = WritingCost.of(0.0, [TimedStep(rows=2, keys=10 + i, seconds=1.0 - 0.05 * i) for i in range(8)])
        assert min(cost.step, cost.row, cost.key) >= 0
        assert cost.seconds(2, 10, (1.0,) * 8, at_once=2) == pytest.approx(8 * 0.825, rel=0.1)

    def test_batches_are_sums_of_their_steps(self) -> None:
        cost = WritingCost(prompt=0.01, step=0.5, row=0.1, key=0.001)
        every = sum(0.5 + 4 * (0.1 + 0.001 * (7 + place)) for place in range(20))
        assert cost.seconds(12, 7, (1.0,) * 20, at_once=4) == pytest.approx(3 * (0.01 * 7 * 4 + every))

    def test_the_last_batch_takes_all_its_steps_for_few_answers(self) -> None:
        cost = WritingCost(prompt=0.01, step=0.5, row=0.1, key=0.0)
        rest = 0.01 * 7 * 2 + 20 * (0.5 + 2 * 0.1)
        both = cost.seconds(4, 7, (1.0,) * 20, at_once=4) + rest
        assert cost.seconds(6, 7, (1.0,) * 20, at_once=4) == pytest.approx(both)
        assert cost.seconds(0, 7, (1.0,) * 20, at_once=4) == 0

    def test_answers_that_end_cost_no_more(self) -> None:
        """One answer at a time costs what the lengths say, one by one."""
        cost, lengths = WritingCost(prompt=0.0, step=0.5, row=0.1, key=0.001), (3, 9, 20)
        naive = sum(0.6 + 0.001 * (7 + place) for length in lengths for place in range(length))
        assert cost.seconds(3, 7, alive_of(lengths), at_once=1) == pytest.approx(naive)

    def test_shares_of_answers(self) -> None:
        assert alive_of((1, 3)) == (1.0, 0.5, 0.5)
        assert alive_by_ends(1, 4, 3) == (1.0, 0.75, 0.75**2)


class TestProbing:
    def test_every_stage_has_its_terms(self, pair: TinyPair, tmp_path: Path) -> None:
        made = planned(pair, tmp_path, sft={"num_train_epochs": 1}, train={"learning_rate": "auto", "eval_steps": 6})
        terms = {stage.stage: stage.terms for stage in made.times}
        assert {"the teacher loads", "the teacher writes"} <= terms["respond"].keys()
        expected = {"the steps", "the first stage", "the search for the learning rate", "the student loads"}
        assert expected <= terms["train"].keys()
        assert {"fidelity", "the student answers", "the teacher answers"} <= terms["evaluate"].keys()
        for stage in made.times:
            assert stage.seconds == pytest.approx(sum(stage.terms.values()))
        assert made.probe is not None and not made.probe.notes
        text = text_of(made)
        assert "by what was timed here" in text and made.probe.alive_from in text

    def test_twice_the_steps_take_twice_as_long(self, pair: TinyPair, tmp_path: Path) -> None:
        found = []
        for steps in (12, 24):
            made = planned(pair, tmp_path, train={"max_steps": steps})
            found.append(next(stage.terms["the steps"] for stage in made.times if stage.stage == "train"))
        assert found[1] == pytest.approx(2 * found[0], rel=0.2)

    def test_a_student_that_writes(self, pair: TinyPair, tmp_path: Path) -> None:
        made = planned(pair, tmp_path, responses={"source": {"name": "student", "refresh": "step"}})
        terms = {stage.stage: stage.terms for stage in made.times}["train"]
        assert {"the student writes", "the teacher scores", "the steps"} <= terms.keys()

    @pytest.mark.parametrize("tick", [0.02, 0.3])
    def test_the_bound_is_kept(self, pair: TinyPair, tmp_path: Path, tick: float) -> None:
        made = planned(pair, tmp_path, tick, seconds=3.0)
        # A piece ends at the first look at the clock after its time; six pieces look a few times at their ends.
        assert made.probe is not None and made.probe.spent <= 3.0 + 6 * 4 * tick

    def test_too_little_time_is_said(self, pair: TinyPair, tmp_path: Path) -> None:
        made = planned(pair, tmp_path, tick=1.0, seconds=0.5)
        assert made.probe is not None and made.probe.training is None
        assert "the training: not timed: 0.5 s are too few; give --probe-seconds more" in text_of(made)


class TestBadInput:
    @pytest.mark.parametrize("seconds", [0.0, -3.0])
    def test_no_time(self, pair: TinyPair, tmp_path: Path, seconds: float) -> None:
        with pytest.raises(LimbeckError, match=f"--probe-seconds is {seconds:g}; expected a number of seconds above 0"):
            planned(pair, tmp_path, seconds=seconds)

    def test_devices_that_are_not_here(self, pair: TinyPair, tmp_path: Path) -> None:
        context = RunContext(load_recipe_or_run(str(pair.recipe(tmp_path / "run"))))
        other = "8xH100" if context.device.type == "cpu" else "cpu"
        case = case_of(context, workload_of(context), fleet_of(other))
        with pytest.raises(LimbeckError, match="name the devices that are here"):
            probe(context, case, 1.0)

    def test_weights_that_are_not_here(self, tmp_path: Path) -> None:
        alone = TinyPair.write(tmp_path)
        (alone.teacher / "model.safetensors").unlink()
        text = text_of(planned(alone, tmp_path))
        assert "the teacher has random weights in the probe: " in text
        assert "the student has random weights in the probe: " in text
        assert "the recipe fits 1xcpu as it is" in text

    def test_out_of_memory(self, pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> float:
            raise MemoryError

        monkeypatch.setattr(probe_module, "training_seconds", full)
        made = planned(pair, tmp_path)
        assert made.probe is not None and made.probe.training is None and made.probe.measures is not None
        assert "the training: not timed: out of memory" in text_of(made)
