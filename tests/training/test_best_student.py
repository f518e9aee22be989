"""Evaluation while it trains: set-aside prompts, the best student handed on, the alarm of a climbing loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.rollouts.development import FEWEST, LARGEST_SHARE, set_aside
from limbeck.training import checkpoints, trained_weights
from limbeck.training.background import Background
from limbeck.training.loss_alarm import QUIET, LossAlarm
from limbeck.types import Interrupted, Response
from tests.training.play import (
    identical,
    metrics,
    play_evaluated,
    settings,
    slowly,
    stop_after,
    tiny_model,
    weights,
)


def _evaluated(folder: Path, chosen: dict[str, Any], **how: Any):
    """A training that measures the responses that were set aside after every fourth step."""
    evaluated = settings(**{"max_steps": 12, "eval_steps": 4, "warmup_steps": 0, **chosen})
    return play_evaluated(folder, evaluated, **how)


def test_a_student_that_is_ruined_on_the_way_is_handed_on_as_it_was_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # However late it is written beside the steps that ruin it.
    threads = slowly(monkeypatch, 0.3)
    # So large a rate does harm from the first step on, and leaves every number finite on any processor.
    ruined = _evaluated(tmp_path / "ruined", {"learning_rate": 1.0, "lr_scheduler_type": "constant"})
    assert identical(weights(ruined), weights(tiny_model(1))) and set(threads) == {"limbeck-background"}
    last = metrics(tmp_path / "ruined")[-1]
    assert last["eval_loss"] > last["eval_loss_before"]
    kept = _evaluated(
        tmp_path / "kept", {"learning_rate": 1.0, "lr_scheduler_type": "constant", "load_best_model_at_end": False}
    )
    assert not identical(weights(kept), weights(ruined))


def test_a_student_that_learns_is_handed_on_as_it_ends(tmp_path: Path):
    student = _evaluated(tmp_path / "with", {"learning_rate": 1e-3})
    lines = metrics(tmp_path / "with")
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 12]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses == sorted(losses, reverse=True) and losses[0] < lines[-1]["eval_loss_before"]
    # Measuring changes nothing.
    unmeasured = _evaluated(tmp_path / "without", {"learning_rate": 1e-3, "load_best_model_at_end": False})
    assert identical(weights(student), weights(unmeasured))


@pytest.mark.parametrize("stop", [3, 5, 9])
def test_the_best_student_survives_an_interruption(tmp_path: Path, stop: int):
    # Warm-up into far too much: the best lies before the end.
    chosen = {"learning_rate": 1.0, "warmup_steps": 12, "save_steps": 2, "lr_scheduler_type": "constant_with_warmup"}
    whole = _evaluated(tmp_path / "whole", chosen)
    with pytest.raises(Interrupted):
        _evaluated(tmp_path / "cut", chosen, should_stop=stop_after(stop))
    assert identical(weights(whole), weights(_evaluated(tmp_path / "cut", chosen)))


def test_the_best_student_that_a_checkpoint_names_stays_until_that_goes(tmp_path: Path):
    """A training that goes on from it may measure another last digit, and come to no better one."""
    model = tiny_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def save(step: int, best: int, keep: int = 1) -> list[str]:
        state = {"best": {"step": best, "loss": 1.0}}
        checkpoints.save(tmp_path, step, model=model, optimizer=optimizer, state=state, keep=keep)
        return sorted(path.name for path in tmp_path.iterdir())

    def better(step: int) -> list[str]:
        with Background() as background:
            trained_weights.save_best(tmp_path, step, model, background)
        return sorted(path.name for path in tmp_path.glob("best-*"))

    assert better(40) == ["best-000040"] and better(50) == ["best-000050"]
    assert save(50, 50) == ["best-000050", "step-000050"]
    assert better(60) == ["best-000050", "best-000060"] and better(70) == ["best-000050", "best-000070"]
    assert save(100, 70, keep=2) == ["best-000050", "best-000070", "step-000050", "step-000100"]
    # Of one that is damaged nothing is known: it is passed over.
    (tmp_path / "step-000050" / "state.json").write_text("{", "utf-8")
    assert better(110) == ["best-000070", "best-000110"]
    assert save(150, 110) == ["best-000110", "step-000150"]


def test_no_best_student_is_written_where_the_last_is_handed_on(tmp_path: Path):
    for best in (True, False):
        folder = tmp_path / str(best)
        _evaluated(folder, {"learning_rate": 1e-3, "load_best_model_at_end": best})
        assert any(folder.glob("checkpoints/best-*")) is best and "eval_loss" in metrics(folder)[-1]


@given(prompts=st.integers(0, 200), size=st.integers(1, 64), answers=st.integers(1, 3))
def test_prompts_are_set_aside_whole_and_in_part(prompts: int, size: int, answers: int):
    responses = {
        row: Response(
            prompt_id=str(row // answers),
            author="teacher",
            prompt_ids=(1,),
            response_ids=(2,) * (row % 5 + 1),
            stop="eos",
        )
        for row in range(prompts * answers)
    }
    trained, aside = set_aside(responses, size)
    assert {**trained, **aside} == responses and not trained.keys() & aside.keys()
    assert not {r.prompt_id for r in trained.values()} & {r.prompt_id for r in aside.values()}
    spared = int(LARGEST_SHARE * prompts)
    assert len({r.prompt_id for r in aside.values()}) == (min(size, spared) if spared >= FEWEST else 0)
    assert set_aside(dict(reversed(responses.items())), size)[1].keys() == aside.keys()


def _alarms(losses: list[float]) -> list[int]:
    """The steps at which the alarm goes off."""
    watch, steps = LossAlarm(), []
    for step, loss in enumerate(losses, start=1):
        # A resumed run repeats it.
        again = LossAlarm()
        again.restore(watch.state())
        raised = watch.see({"step": step, "loss": loss})
        assert again.see({"step": step, "loss": loss}) == raised
        steps += [step] * len(raised)
    return steps


def test_the_alarm_of_a_loss_that_climbs_away():
    climbing = [0.7 + 0.17 * i for i in range(20)]
    assert len(_alarms(climbing)) == 1 and _alarms(climbing)[0] >= QUIET
    assert not _alarms([2.0 - 0.05 * i for i in range(30)])
    # Batches differ by a third without an alarm.
    assert not _alarms([1.0 + (0.33 if i % 3 else -0.33) for i in range(200)])
    # It says so again only after the loss came down.
    assert len(_alarms([1.0] * 10 + [3.0] * 30 + [1.0] * 40 + [3.0] * 30)) == 2


def test_the_alarm_is_in_the_metrics_and_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chosen = {
        "learning_rate": 1.0,
        "max_steps": 25,
        "warmup_steps": 12,
        "lr_scheduler_type": "constant_with_warmup",
        "eval_steps": 100,
    }
    _evaluated(tmp_path, chosen)
    assert any("loss_climbs" in line.get("warnings", ()) for line in metrics(tmp_path))
    assert "loss_climbs: " in capsys.readouterr().err


RUINING = {"learning_rate": 10.0, "lr_scheduler_type": "constant", "eval_steps": 2, "max_steps": 40}


def test_a_training_that_gains_nothing_ends_early(tmp_path: Path):
    student = _evaluated(tmp_path / "early", RUINING | {"early_stopping_patience": 3})
    assert metrics(tmp_path / "early")[-1]["step"] == 6
    assert identical(weights(student), weights(tiny_model(1)))
    # One that learns is not ended, unless more is asked of it than it gains.
    learning = {"learning_rate": 1e-3, "eval_steps": 2, "early_stopping_patience": 1}
    _evaluated(tmp_path / "learns", learning)
    assert metrics(tmp_path / "learns")[-1]["step"] == 12
    _evaluated(tmp_path / "greedy", learning | {"early_stopping_threshold": 100.0})
    assert metrics(tmp_path / "greedy")[-1]["step"] == 2


def test_patience_outlives_an_interruption(tmp_path: Path):
    chosen = RUINING | {"early_stopping_patience": 3, "save_steps": 1}
    _evaluated(tmp_path / "whole", chosen)
    for after in (3, 2):
        with pytest.raises(Interrupted):
            _evaluated(tmp_path / "parts", chosen, should_stop=stop_after(after))
    student = _evaluated(tmp_path / "parts", chosen)
    assert metrics(tmp_path / "parts")[-1]["step"] == 6
    assert identical(weights(student), weights(tiny_model(1)))
    # It was ended already: asked again, not a step more.
    _evaluated(tmp_path / "parts", chosen)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
