"""The search for the learning rate: pure choices, trials that are taken back, a search that goes on after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.training.learning_rate import (
    HIGHEST,
    LOWEST,
    RATIO,
    TRIAL_STEPS,
    RateSearch,
    Trial,
    best_rate,
    first_guess,
    next_rate,
    trial_factors,
)
from limbeck.types import Interrupted
from tests.training.play import identical, metrics, play, settings, stop_after, tiny_lora, tiny_model, weights


def _searched(loss_at, guess: float, before: float) -> list[Trial]:
    """All trials of a search over a known curve."""
    trials: list[Trial] = []
    while (rate := next_rate(guess, before, trials)) is not None:
        trials.append(Trial(learning_rate=rate, loss=loss_at(rate)))
    return trials


def _bowl(best: float):
    """A loss that is lowest at a rate, a parabola over its logarithm."""
    return lambda rate: 1.0 + math.log10(rate / best) ** 2


@given(best=st.floats(-6.0, -2.0), guess=st.floats(-6.0, -2.0))
def test_the_lowest_point_of_a_bowl_is_found_from_anywhere(best: float, guess: float):
    # No trial does harm: it is always seen which way is down.
    trials = _searched(_bowl(10**best), 10**guess, before=100.0)
    found = best_rate(10**guess, 100.0, trials)
    assert math.log10(found) == pytest.approx(best, abs=1e-6)


@given(best=st.floats(-6.5, -3.0), guess=st.floats(-3.0, -1.5))
def test_a_guess_that_ruins_the_student_leads_downwards(best: float, guess: float):
    def loss_at(rate: float) -> float:
        # Above ten times the best rate the student is lost; below it gains a little.
        return math.inf if rate > 10 * 10**best else 2.0 - 1.0 / (1 + math.log10(rate / 10**best) ** 2)

    trials = _searched(loss_at, 10**guess, before=2.0)
    found = best_rate(10**guess, 2.0, trials)
    assert abs(math.log10(found) - best) <= math.log10(RATIO)


def test_where_every_rate_does_harm_the_lowest_one_is_taken():
    trials = _searched(lambda rate: 3.0, 3e-4, before=2.0)
    assert len({t.learning_rate for t in trials}) == len(trials)
    assert best_rate(3e-4, 2.0, trials) == min(t.learning_rate for t in trials) < LOWEST * RATIO


@given(guess=st.floats(-7.0, -1.0))
def test_a_search_ends_and_stays_in_bounds(guess: float):
    for loss_at in (lambda rate: rate, lambda rate: -rate, lambda rate: math.nan):
        trials = _searched(loss_at, 10**guess, before=1.0)
        assert all(LOWEST * 0.99 <= t.learning_rate <= HIGHEST * 1.01 for t in trials)
        assert len(trials) <= 14


def test_a_search_begins_lower_in_wide_models_and_higher_with_adapters():
    assert first_guess(4096, adapters=False) < first_guess(576, adapters=False) < first_guess(576, adapters=True)
    assert len(trial_factors()) == TRIAL_STEPS and max(trial_factors()) == 1.0


def test_trials_leave_no_trace(tmp_path: Path):
    """A run whose rate was searched is, bit for bit, the run that was given the rate."""
    auto = play(tiny_model(1), tmp_path / "auto", settings(learning_rate="auto"))
    found = json.loads((tmp_path / "auto" / "learning_rate.json").read_text("utf-8"))
    given_rate = play(tiny_model(1), tmp_path / "given", settings(learning_rate=found["chosen"]))
    assert identical(weights(auto), weights(given_rate))
    assert len(found["trials"]) >= 3 and found["chosen"] == max(m["learning_rate"] for m in metrics(tmp_path / "auto"))
    best = min(t["loss"] for t in found["trials"] if t["loss"] is not None)
    assert best < found["before"]


def test_adapters_are_searched_too(tmp_path: Path):
    student = tiny_lora(1, dropout=0.1)
    play(student, tmp_path, settings(learning_rate="auto"))
    assert RateSearch.read(tmp_path / "learning_rate.json").chosen  # pyright: ignore[reportOptionalMemberAccess]


def test_a_search_that_was_stopped_goes_on_with_the_next_trial(tmp_path: Path):
    whole = play(tiny_model(1), tmp_path / "whole", settings(learning_rate="auto"))
    stopped = tmp_path / "stopped"
    with pytest.raises(Interrupted, match="learning rate"):
        play(tiny_model(1), stopped, settings(learning_rate="auto"), should_stop=stop_after(TRIAL_STEPS + 5))
    half = RateSearch.read(stopped / "learning_rate.json")
    assert half is not None and half.chosen is None and len(half.trials) == 1
    resumed = play(tiny_model(1), stopped, settings(learning_rate="auto"))
    assert identical(weights(whole), weights(resumed))
    files = [(folder / "learning_rate.json").read_bytes() for folder in (tmp_path / "whole", stopped)]
    assert files[0] == files[1]


def test_a_resumed_training_keeps_its_rate_without_the_file(tmp_path: Path):
    chosen = settings(learning_rate="auto", save_steps=2)
    whole = play(tiny_model(1), tmp_path / "whole", chosen)
    # Asked once per step; the trials' steps come first.
    steps = sum(len(json.loads((tmp_path / "whole" / "learning_rate.json").read_text())["trials"]) * [TRIAL_STEPS])
    with pytest.raises(Interrupted, match="after step 3"):
        play(tiny_model(1), tmp_path / "cut", chosen, should_stop=stop_after(steps + 3))
    (tmp_path / "cut" / "learning_rate.json").unlink()
    assert identical(weights(whole), weights(play(tiny_model(1), tmp_path / "cut", chosen)))


def test_a_rate_that_leaves_the_finite_numbers_counts_as_the_worst(tmp_path: Path):
    search = RateSearch(metric="loss", before=1.0, trials=(Trial(learning_rate=1e-1, loss=math.inf),))
    search.write(tmp_path / "learning_rate.json")
    assert RateSearch.read(tmp_path / "learning_rate.json") == search
    assert torch.isfinite(torch.tensor(best_rate(1e-1, 1.0, search.trials)))
