"""The learning rate as a function of the step, against transformers' own schedulers."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import get_scheduler

from limbeck.recipe.load import TrainSection
from limbeck.training.schedules import learning_rate, total_steps
from limbeck.types import LimbeckError

KINDS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_min_lr")


def played(kind: str, *, rate: float, warmup: int, total: int) -> list[float]:
    """The rates transformers' scheduler gives, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    specific = {"min_lr_rate": 0.1} if kind == "cosine_with_min_lr" else None
    scheduler = get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=specific)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_rates_are_transformers_own(kind):
    rate_of = learning_rate(TrainSection(lr_scheduler_type=kind, learning_rate=3e-4), 17)
    expected = played(kind, rate=3e-4, warmup=0, total=17)
    assert [rate_of(step) for step in range(17)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_transformers_own_without_its_first_step_of_rate_zero(kind):
    chosen = TrainSection(lr_scheduler_type=kind, learning_rate=3e-4, warmup_steps=5)
    rate_of = learning_rate(chosen, 17)
    expected = played(kind, rate=3e-4, warmup=5, total=18)[1:]
    assert [rate_of(step) for step in range(17)] == pytest.approx(expected, rel=1e-12)
    assert rate_of(0) > 0


def test_warm_up_as_a_share_of_the_run_and_as_steps():
    by_share = learning_rate(TrainSection(warmup_ratio=0.2), 25)
    by_steps = learning_rate(TrainSection(warmup_steps=5), 25)
    assert [by_share(i) for i in range(25)] == [by_steps(i) for i in range(25)]


def test_the_step_number_is_the_whole_state():
    rate_of = learning_rate(TrainSection(), 10)
    forwards = [rate_of(i) for i in range(10)]
    assert [rate_of(i) for i in reversed(range(10))] == forwards[::-1]


def test_a_rate_below_the_polynomials_end_is_refused():
    with pytest.raises(LimbeckError, match="learning_rate"):
        learning_rate(TrainSection(lr_scheduler_type="polynomial", learning_rate=5e-8), 10)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_train_epochs": 2.0}, 20),
        ({"num_train_epochs": 0.25}, 3),
        ({"num_train_epochs": 0.01}, 1),
        ({"num_train_epochs": 1.1}, 11),
        ({"max_steps": 7, "num_train_epochs": 99.0}, 7),
    ],
)
def test_total_steps(changes, expected):
    assert total_steps(TrainSection(**changes), 10) == expected
