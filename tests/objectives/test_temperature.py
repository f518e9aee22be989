"""The temperature axis: what is accepted, what is refused or warned about, what is recorded, and what adapts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from limbeck.objectives import (
    AdaptiveTemperature,
    Temperature,
    TemperatureSchedule,
    build_objective,
    tail_weights,
    token_difficulty,
)
from limbeck.rollouts.collate import collate
from limbeck.training.loss import LossPlan, StepSettings, StudentLoss
from limbeck.types import LimbeckError, Sampling
from tests.objectives.cases import DEFAULTS
from tests.objectives.pairs import Pair
from tests.training.play import VOCAB, tiny_model, tiny_responses, tiny_teacher


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": 0.0}, "expected a positive number"),
        ({"loss": -1.0}, "expected a positive number"),
        ({"student": math.nan}, "expected a positive number"),
        ({"teacher": math.inf}, "expected a positive number"),
        ({"loss": torch.tensor([1.0, 0.0])}, "positive and finite"),
        ({"loss": torch.ones(2, 2)}, r"expected \(N,\)"),
        ({"scale": "tau3"}, "auto, none, tau, tau2"),
        ({"scale": 0.0}, "positive number"),
        ({"student": 1.0, "teacher": 2.0}, "no neutral factor exists"),
        ({"student": 2.0, "adapt": AdaptiveTemperature(), "teacher": 2.0}, "set loss only"),
    ],
)
def test_bad_temperatures_are_refused(options, match):
    with pytest.raises(LimbeckError, match=match):
        Temperature(**options)


def test_a_temperature_for_other_tokens_is_refused():
    pair = Pair()
    with pytest.raises(LimbeckError, match="one tau a token"):
        pair.fused(DEFAULTS["fkl"], Temperature(loss=torch.ones(pair.n + 1)))


@pytest.mark.parametrize(
    ("name", "options", "temperature", "match"),
    [
        ("tv", {}, {"loss": 2.0, "scale": "tau2"}, "tau2 grows"),
        ("ab", {"alpha": 0.2, "beta": 0.7}, {"loss": 2.0}, "use a sum of 1"),
        ("fkl", {}, {"loss": 6.0}, "close to matching logits"),
    ],
)
def test_misleading_combinations_warn(name, options, temperature, match):
    pair = Pair()
    with pytest.warns(UserWarning, match=match):
        pair.fused(build_objective(name, **options), Temperature(**temperature))


@pytest.mark.parametrize(
    ("name", "options", "factor"),
    [
        ("fkl", {}, 4.0),
        ("tv", {}, 2.0),
        ("csd", {}, 1.0),
        ("dld", {}, 1.0),
        ("ce", {}, None),
        ("sum", {}, None),
        ("fkl", {"scale": "none"}, 1.0),
        ("csd", {"scale": "tau2"}, 4.0),
        ("tv", {"scale": 7.5}, 7.5),
    ],
)
def test_the_resolved_factor_is_recorded(name, options, factor):
    record = Temperature(loss=2.0, **options).record(DEFAULTS[name])
    assert record == {
        "student": 2.0,
        "teacher": 2.0,
        "scale": options.get("scale", "auto"),
        "factor": factor,
        "adapt": None,
    }


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("js", {"beta": 0.0}, r"expected a number in \(0, 1\)"),
        ("js", {"beta": 1.0, "form": "normalized"}, r"expected a number in \(0, 1\)"),
        ("js", {"form": "trl"}, "gkd, endpoint, normalized"),
        ("skl", {"alpha": 0.0}, "alpha=0.0"),
        ("srkl", {"alpha": 1.0}, "alpha=1.0"),
        ("akl", {"mu": 1.5}, "mu=1.5"),
        ("taid", {"progress": 0.0}, "progress=0.0"),
        ("amid", {"between": "both"}, "between='both'"),
        ("amid", {"between": "assistant_teacher", "detach_assistant": True}, "no gradient"),
        ("tad", {"k": 0}, "k=0"),
        ("csd", {"first": "both"}, "csd first='both'"),
        ("dld", {"normalize": "unit"}, "normalize='unit'"),
        ("lskd", {"inner": "ce"}, "function of the two rows"),
        ("hidden", {"kind": "l1"}, "cosine, mse"),
        ("skl", {"alpha": "0.1"}, "expected a float"),
        ("tad", {"k": 1.5}, "expected a int"),
        ("csd", {"detach": 1}, "expected a bool"),
        ("sum", {"parts": []}, "no parts"),
        ("sum", {"parts": "fkl"}, "expected a list"),
        ("sum", {"parts": [{"weight": 1}]}, "expected the name"),
        ("sum", {"parts": [{"name": "fkl", "weight": "1"}]}, "expected a number"),
        ("eopd", {"base": {"name": "fkll"}}, "nearest: 'fkl'"),
    ],
)
def test_options_out_of_range_are_refused(field, value: dict[str, Any], match):
    with pytest.raises(LimbeckError, match=match):
        build_objective(field, **value)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(LimbeckError, match="nearest: 'rkl'"):
        build_objective("rkll")
    with pytest.raises(LimbeckError, match="nearest: 'first'"):
        build_objective("csd", frist="teacher")


def test_schedule_moves_between_its_ends():
    schedule = TemperatureSchedule(start=4.0, end=1.0, shape="cosine")
    assert [schedule.at(x).loss for x in (-1, 0, 0.5, 1, 2)] == pytest.approx([4.0, 4.0, 2.5, 1.0, 1.0])
    assert TemperatureSchedule(start=4.0, end=1.0, shape="linear").at(0.25).loss == 3.25
    with pytest.raises(LimbeckError, match="positive"):
        TemperatureSchedule(start=4.0, end=0.0)


def test_difficulty_is_the_hellinger_distance():
    pair = Pair(n=70)
    p, q = pair.teacher_logits().softmax(-1), pair.student_logits().detach().softmax(-1)
    expected_N = (1 - (p * q).sqrt().sum(-1)).sqrt()
    torch.testing.assert_close(token_difficulty(pair.hidden, pair.head, pair.signal), expected_N)


def test_adaptive_temperature_is_low_where_it_is_hard():
    pair = Pair(n=71)
    difficulty_N = token_difficulty(pair.hidden, pair.head, pair.signal)
    tau_N = AdaptiveTemperature(strength=0.5).tau(2.0, difficulty_N)
    assert tau_N.min() > 2 * 0.6065 and tau_N.max() < 2 * 1.6488
    assert tau_N[difficulty_N.argmax()] == tau_N.min() and tau_N[difficulty_N == difficulty_N.median()] == 2.0
    adapted = pair.fused(DEFAULTS["fkl"], Temperature(loss=2.0, adapt=AdaptiveTemperature()))
    pair.check(adapted, pair.naive(DEFAULTS["fkl"], Temperature(loss=tau_N)))
    assert AdaptiveTemperature().tau(2.0, torch.zeros(3)).isfinite().all()


def test_tail_weights_are_beta_over_the_mean_tail_of_the_sequence():
    pair = Pair(n=30)
    sequence_N = torch.arange(30) // 10
    p = pair.teacher_logits().softmax(-1)
    mass_N = 1 - p.topk(4, dim=-1).values.sum(-1)
    expected_N = 2.0 / torch.stack([mass_N[sequence_N == s].mean() for s in range(3)])[sequence_N]
    got_N = tail_weights(pair.signal, sequence_N, k=4, beta=2.0)
    torch.testing.assert_close(got_N, expected_N)
    objective = build_objective("tad", k=4)
    fused = pair.fused(objective, token_options={"tail_weight": got_N})
    pair.check(fused, pair.naive(objective, token_options={"tail_weight": got_N}))
    # The fused loss measures them itself where the objective asks for it.
    measured = build_objective("tad", k=4, tail_weight=2.0, per_sequence=True)
    again = pair.fused(measured, sequence_N=sequence_N)
    torch.testing.assert_close(again.value_N, fused.value_N)
    with pytest.raises(LimbeckError, match="sequence_N"):
        pair.fused(measured)
    with pytest.raises(LimbeckError, match="tail_weights"):
        pair.naive(measured)


def test_the_temperature_of_sampling_never_enters_a_loss():
    """T14: the same tokens sampled at another temperature give the same loss, bit for bit."""
    losses = []
    for sampling in (Sampling(temperature=0.5), Sampling(temperature=1.5)):
        rows = [replace(response, sampling=sampling) for response in tiny_responses(4)]
        batch = collate(rows, range(4), pad_id=0)
        student, signal = tiny_model(1), tiny_teacher().signal(batch)
        loss_plan = LossPlan(objective=DEFAULTS["fkl"])
        module = StudentLoss(student, loss_plan, vocab_size=VOCAB, projection_ED=None, compile="off")
        loss, *_ = module(
            batch, signal, torch.ones(len(batch.labels_N)), StepSettings(temperature=Temperature(loss=2.0))
        )
        losses.append(loss)
    assert torch.equal(*losses)


def test_no_gradient_flows_into_a_temperature():
    """T17: a tau a token is held constant, also where it carries a graph."""
    pair = Pair(n=6)
    tau_N = torch.full((6,), 2.0, dtype=torch.float64, requires_grad=True)
    pair.fused(DEFAULTS["fkl"], Temperature(loss=tau_N)).loss.backward()
    assert tau_N.grad is None


@pytest.mark.parametrize("base", ["tv", "ab"])
def test_warnings_reach_objectives_inside_others(base):
    pair, objective = Pair(n=4), build_objective("eopd", base=base)
    with pytest.warns(UserWarning, match=base):
        pair.fused(objective, Temperature(loss=2.0, scale="tau2"))
    # One side below 1 is tempering too.
    with pytest.warns(UserWarning, match=base):
        pair.fused(objective, Temperature(student=0.5, teacher=1.0, scale="tau2"))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("eopd", {"base": "hidden"}, "eopd base='hidden'"),
        ("eopd", {"gated": {"name": "sum", "parts": ["fkl", "hidden"]}}, "eopd gated='sum'"),
        ("eopd", {"threshold": float("nan")}, "threshold=nan"),
        ("lskd", {"inner": "hidden"}, "lskd inner='hidden'"),
        ("amid", {"alpha": float("inf")}, "amid alpha=inf"),
        ("sum", {"parts": [{"name": "fkl", "weight": float("nan")}]}, "weight nan"),
    ],
)
def test_objectives_that_make_no_sense(name, options, says):
    with pytest.raises(LimbeckError, match=says):
        build_objective(name, **options)


def test_two_tails_cannot_be_weighed_by_one_number():
    pair = Pair(n=6)
    parts = [{"name": "tad", "k": 3, "per_sequence": True}, {"name": "tad", "k": 20}]
    with pytest.raises(LimbeckError, match="beside another tad"):
        pair.fused(build_objective("sum", parts=parts), sequence_N=torch.zeros(6, dtype=torch.int64))
