"""Means, intervals and files of the evaluation, against hand cases and direct resampling."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluation.scores import bootstrap
from limbeck.evaluation.scores import files as scores
from limbeck.evaluation.scores.metrics import METRICS
from limbeck.types import LimbeckError, Score, ScoredRow


def row(name, weight, **values):
    return ScoredRow(id=name, weight=weight, values=values)


def width(score):
    assert score.low is not None and score.high is not None
    return score.high - score.low


def sample(seed=0, examples=40, shift=0.0):
    rng = np.random.default_rng(seed)
    return [
        row(
            f"p{i}",
            float(rng.integers(5, 90)),
            forward_kl=float(rng.gamma(2.0) + shift),
            top1_agreement=rng.random(),
        )
        for i in range(examples)
    ]


def test_the_mean_is_over_tokens_not_over_examples():
    rows = [row("a", 1.0, forward_kl=4.0), row("b", 3.0, forward_kl=0.0)]
    score = scores.summarise(rows)["forward_kl"]
    assert score.mean == 1.0 and score.n == 2
    assert (score.low, score.high) == (0.0, 4.0)


def test_the_interval_is_the_percentile_bootstrap_of_whole_examples():
    rows = sample()
    found = scores.summarise(rows, seed=3, resamples=4000)["forward_kl"]
    rng = np.random.default_rng(99)
    weight, value = np.array([r.weight for r in rows]), np.array([r.values["forward_kl"] for r in rows])
    means = []
    for _ in range(4000):
        pick = rng.integers(0, len(rows), len(rows))
        means.append((weight[pick] * value[pick]).sum() / weight[pick].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.08 * (high - low))
    assert found.high == pytest.approx(high, abs=0.08 * (high - low))
    assert low < found.mean < high


def test_the_draws_are_the_same_in_pieces(monkeypatch):
    whole = scores.summarise(sample(), seed=3, resamples=501)
    monkeypatch.setattr(bootstrap, "AT_A_TIME", 40 * 7)
    assert scores.summarise(sample(), seed=3, resamples=501) == whole
    assert scores.paired_change(sample(), sample(1), seed=3, resamples=501)["forward_kl"].n == 40


def shares(*parts):
    return [
        ScoredRow(id=str(n), weight=1.0, values={}, sums={"draft_acceptance": part}) for n, part in enumerate(parts)
    ]


def test_a_share_of_sums_stays_a_share():
    found = scores.summarise(shares((4, 5), (0, 1), (3, 3), (1, 1)))["draft_acceptance"]
    assert found.low is not None and found.high is not None
    assert found.mean == 0.8 and 0.0 <= found.low < 0.8 < found.high <= 1.0


def test_a_ratio_whose_sums_are_nothing_is_left_out():
    assert scores.summarise(shares((0, 0), (0, 0))) == {}
    # Of resamples without any draft that was looked at nothing is known.
    found = scores.summarise(shares((0, 0), (0, 0), (0, 0), (1, 2), (2, 2)))["draft_acceptance"]
    assert found.low is not None and found.high is not None
    assert found.mean == 0.75 and 0.5 <= found.low <= found.high <= 1.0


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        rows = [row(str(i), 1.0, forward_kl=float(x)) for i, x in enumerate(rng.normal(1.0, 0.5, 40))]
        score = scores.summarise(rows, seed=trial, resamples=400)["forward_kl"]
        assert score.low is not None and score.high is not None
        hits += score.low <= 1.0 <= score.high
    assert 0.89 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    rows = sample()
    assert scores.summarise(rows, seed=1) == scores.summarise(rows, seed=1)
    assert scores.summarise(rows, seed=1) != scores.summarise(rows, seed=2)


def test_one_example_has_a_mean_but_no_interval():
    score = scores.summarise([row("a", 7.0, rouge_l=0.25)])["rouge_l"]
    assert (score.mean, score.low, score.high, score.n) == (0.25, None, None, 1)


def test_change_is_paired_and_narrower_than_the_difference_of_the_sides():
    before = sample()
    after = [
        ScoredRow(id=r.id, weight=r.weight, values={k: v - 1 for k, v in r.values.items()}) for r in reversed(before)
    ]
    change = scores.paired_change(before, after)["forward_kl"]
    assert change.mean == pytest.approx(-1.0, abs=1e-12)
    assert width(change) < 1e-9
    apart = scores.summarise(before)["forward_kl"]
    assert width(apart) > 0.1


def test_change_refuses_other_examples():
    with pytest.raises(LimbeckError, match="same held-out examples"):
        scores.paired_change(sample(examples=4), sample(examples=5))
    with pytest.raises(LimbeckError, match="expected the same metrics"):
        scores.paired_change([row("a", 1.0, forward_kl=1.0)], [row("a", 1.0, reverse_kl=1.0)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no examples"),
        ([row("a", 1.0, forward_kl=math.nan)], "expected a finite number"),
        ([row("a", 0.0, forward_kl=1.0)], "expected more than 0"),
        ([row("a", 1.0, forward_kl=1.0), row("a", 1.0, forward_kl=1.0)], "twice"),
        ([row("a", 1.0, forward_kl=1.0), row("b", 1.0, reverse_kl=1.0)], "as the first row"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_in_one_line(rows, message):
    with pytest.raises(LimbeckError, match=message) as caught:
        scores.summarise(rows)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(-1e6, 1e6, allow_subnormal=False)), min_size=2, max_size=30))
def test_the_mean_equals_the_exact_sum_and_bounds_hold(pairs):
    rows = [row(str(i), w, forward_kl=v) for i, (w, v) in enumerate(pairs)]
    score = scores.summarise(rows, resamples=50)["forward_kl"]
    exact = math.fsum(w * v for w, v in pairs) / math.fsum(w for w, _ in pairs)
    values = [v for _, v in pairs]
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert score.mean == pytest.approx(exact, abs=slack)
    assert score.low is not None and score.high is not None
    assert min(values) - slack <= score.low <= score.high <= max(values) + slack


def test_files_round_trip_and_name_each_other(tmp_path):
    before, after = sample(shift=1.0), sample()
    rouge = [row(r.id, 1.0, rouge_l=0.5) for r in before]
    written = scores.write_scores(tmp_path, before={"fidelity": before, "rouge": rouge}, after={"fidelity": after})
    document = json.loads((tmp_path / "scores.json").read_text())
    for part in ("before", "after", "change"):
        assert {name: Score(**score) for name, score in document[part].items()} == getattr(written, part)
    assert document["metrics"]["forward_kl"]["unit"] == "nats/token"
    assert set(document["change"]) == {"forward_kl", "top1_agreement"}
    assert document["rows"]["after"] == {"fidelity": "scores/after.fidelity.jsonl"}
    assert scores.read_rows(tmp_path / document["rows"]["before"]["fidelity"]) == before
    assert not list(tmp_path.rglob("*.partial"))


def test_a_half_finished_run_has_empty_parts(tmp_path):
    written = scores.write_scores(tmp_path, before={"fidelity": sample()}, after={})
    assert written.before and not written.after and not written.change
    document = json.loads((tmp_path / "scores.json").read_text())
    assert set(document["before"]) == set(written.before) and document["after"] == document["change"] == {}


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "weight": 1, "forward_kl": 0.5}\n{"id": "b"\n')
    with pytest.raises(LimbeckError, match=r"rows\.jsonl:2"):
        scores.read_rows(path)


def test_every_metric_is_described():
    for name, metric in METRICS.items():
        assert metric.label and metric.meaning, name
        assert metric.teacher is None or METRICS[metric.teacher].better == "context", name
        known = metric.teacher is not None or metric.teacher_value is not None
        assert (metric.better == "match") <= known, name
