"""Calibration errors against hand cases and the definition, and how honest their intervals are."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluation.scores import files as scores
from limbeck.evaluation.scores.pooled import calibration_error
from limbeck.evaluation.token_metrics.calibration import BINS, bin_sums, curve, pooled_parts
from limbeck.types import LimbeckError, ScoredRow


def ece(confidence, outcome):
    one = torch.zeros(len(confidence), dtype=torch.int64)
    sums = bin_sums(torch.tensor(confidence, dtype=torch.float64), torch.tensor(outcome), one, 1)
    return float(calibration_error(np.array([pooled_parts(sums[0])]))[0])


def row(name, parts, tokens=1.0):
    return ScoredRow(id=name, weight=tokens, values={"forward_kl": 0.0}, sums={"student_ece": parts})


def test_by_hand():
    """Bins (12/15, 13/15] with 0.82 and 0.86, (8/15, 9/15] with 0.55: |1 - 1.68| / 3 + |1 - 0.55| / 3."""
    assert ece([0.82, 0.86, 0.55], [1.0, 0.0, 1.0]) == pytest.approx((0.68 + 0.45) / 3, abs=1e-9)


def test_gaps_cancel_within_a_bin_and_not_between_bins():
    assert ece([0.5, 0.5], [1.0, 0.0]) == pytest.approx(0.0, abs=1e-9)
    assert ece([0.3, 0.7], [1.0, 0.0]) == pytest.approx(0.7, abs=1e-9)


def test_an_edge_belongs_to_the_bin_below_it():
    edges = torch.arange(1, BINS + 1, dtype=torch.float64) / BINS
    sums = bin_sums(edges, torch.zeros(BINS), torch.zeros(BINS, dtype=torch.int64), 1)[0]
    assert sums[0].tolist() == [1.0] * BINS
    above = torch.nextafter(edges[:-1], torch.ones(()).double())
    sums = bin_sums(above, torch.zeros(BINS - 1), torch.zeros(BINS - 1, dtype=torch.int64), 1)[0]
    assert sums[0].tolist() == [0.0] + [1.0] * (BINS - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.integers(0, 3)), min_size=1, max_size=60))
def test_what_examples_add_up_to_is_the_definition(tokens):
    confidence, outcome, example = zip(*tokens, strict=True)
    direct = 0.0
    for b in range(BINS):
        held = [
            (c, o) for c, o in zip(confidence, outcome, strict=True) if b / BINS < c <= (b + 1) / BINS or c == b == 0
        ]
        if held:
            mean, accuracy = (sum(side) / len(held) for side in zip(*held, strict=True))
            direct += len(held) / len(tokens) * abs(accuracy - mean)
    sums = bin_sums(torch.tensor(confidence, dtype=torch.float64), torch.tensor(outcome), torch.tensor(example), 4)
    parts = np.array([pooled_parts(one) for one in sums])
    assert float(calibration_error(parts.sum(0)[None])[0]) == pytest.approx(direct, abs=1e-9)
    points = curve(sums.sum(0))
    assert sum(point["tokens"] for point in points) == len(tokens)
    again = sum(point["tokens"] * abs(point["outcome"] - point["confidence"]) for point in points) / len(tokens)
    assert again == pytest.approx(direct, abs=1e-9)


def test_a_row_keeps_its_parts_on_disk(tmp_path):
    rows = [row("a", (0.1 + 0.2, -1 / 3, 2.0)), ScoredRow(id="b", weight=1.0, values={"forward_kl": 1.0})]
    scores.write_rows(tmp_path / "rows.jsonl", rows)
    assert scores.read_rows(tmp_path / "rows.jsonl") == rows
    assert "sums" not in json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1])


def test_rows_with_other_parts_are_refused():
    with pytest.raises(LimbeckError, match=r"'b' measures forward_kl; expected forward_kl, student_ece"):
        scores.summarise([row("a", (0.5, 1.0)), ScoredRow(id="b", weight=1.0, values={"forward_kl": 1.0})])
    with pytest.raises(LimbeckError, match=r"student_ece of example 'a' is nan"):
        scores.summarise([row("a", (math.nan, 1.0))])


def drawn(rng, examples, shift):
    """Rows of 40 tokens whose confidence is too high by `shift` in log-odds; each example leans its own way."""
    logit = rng.normal(1.0, 0.5, (examples, 1)) + rng.normal(0, 1.2, (examples, 40))
    confidence = torch.from_numpy(1 / (1 + np.exp(-logit))).flatten()
    outcome = torch.from_numpy(rng.random((examples, 40)) < 1 / (1 + np.exp(shift - logit))).flatten()
    sums = bin_sums(confidence, outcome, torch.arange(examples).repeat_interleave(40), examples)
    return [row(str(i), pooled_parts(one), 40.0) for i, one in enumerate(sums)]


@pytest.mark.parametrize(("shift", "least"), [(0.1, 0.8), (1.0, 0.88)])
def test_the_interval_covers_the_truth_where_percentiles_would_lie_above_it(shift, least):
    truth = scores.summarise(drawn(np.random.default_rng(0), 20_000, shift), resamples=2)["student_ece"].mean
    hits = 0
    for trial in range(100):
        found = scores.summarise(drawn(np.random.default_rng(trial + 1), 40, shift), seed=trial, resamples=300)
        score = found["student_ece"]
        assert score.low is not None and score.high is not None
        assert 0 <= score.low <= score.mean <= score.high
        hits += score.low <= truth <= score.high
    assert least <= hits / 100


def test_the_change_of_a_calibration_error_is_paired():
    before, after = (drawn(np.random.default_rng(3), 60, shift) for shift in (1.5, 0.0))
    change = scores.paired_change(before, after)["student_ece"]
    means = [scores.summarise(rows)["student_ece"].mean for rows in (before, after)]
    assert change.mean == pytest.approx(means[1] - means[0], abs=1e-12)
    assert change.low is not None and change.high is not None and change.low < change.high < 0
    same = scores.paired_change(before, before)["student_ece"]
    assert (same.low, same.mean, same.high) == (0.0, 0.0, 0.0)
