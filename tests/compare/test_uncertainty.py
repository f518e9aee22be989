"""The numbers of a comparison against slow and independent ways to the same."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lab_pages import half_widths, resolved
from limbeck.compare.pairwise import ComparedPair, Difference, holm, letters
from limbeck.compare.student_t import quantile, tail
from limbeck.compare.uncertainty import Resampled, ResampledMetric, arm_means, draws

# Two-sided 5 % and 0.1 % points of Student's t, from printed tables.
PRINTED = {1: (12.706, 636.62), 2: (4.3027, 31.599), 5: (2.5706, 6.8688), 10: (2.2281, 4.5869), 120: (1.9799, 3.3735)}


@pytest.mark.parametrize("dof", PRINTED)
def test_students_t_is_the_printed_one(dof):
    assert [quantile(level, dof) for level in (0.05, 0.001)] == pytest.approx(PRINTED[dof], rel=1e-4)


@given(st.floats(1e-6, 0.9), st.floats(1.0, 3000.0))
@settings(max_examples=50, deadline=None)
def test_tail_and_quantile_undo_each_other(level, dof):
    assert tail(quantile(level, dof), dof) == pytest.approx(level, rel=1e-5)


def test_tail_with_one_degree_of_freedom_is_cauchys():
    for value in (0.1, 1.0, 7.0):
        assert tail(value, 1.0) == pytest.approx(1 - 2 * math.atan(value) / math.pi)


def sheet_of(values_ASE, seeds=None, resamples=400):
    """A sheet from values (arms, seeds, examples), every example of weight 1."""
    arms, S, examples = values_ASE.shape
    seeds = seeds or [list(range(S))] * arms
    runs = [(arm, n) for arm in range(arms) for n in range(len(seeds[arm]))]
    value_RE = np.stack([values_ASE[arm, n] for arm, n in runs])
    counts_BE = draws(examples, resamples, f"{examples} examples")
    return ResampledMetric(
        arm_R=tuple(arm for arm, _ in runs),
        seed_R=tuple(seeds[arm][n] for arm, n in runs),
        value_R=value_RE.mean(1),
        drawn_BR=counts_BE @ value_RE.T / examples,
        examples=examples,
    )


def noise(arms=3, seeds=3, examples=30, *, between=0.1, rng=0):
    rng = np.random.default_rng(rng)
    seed_AS1 = between * rng.normal(size=(arms, seeds, 1))
    example_E = rng.normal(size=examples)
    return seed_AS1 + example_E + 0.2 * rng.normal(size=(arms, seeds, examples))


def test_resamples_are_those_of_a_loop_that_draws_seeds_and_examples():
    values_ASE = noise(arms=2, seeds=3, examples=8)
    sheet = sheet_of(values_ASE, resamples=25)
    example_BE, seed_BS = draws(8, 25, "8 examples"), draws(3, 25, "seeds (0, 1, 2)")
    for arm in range(2):
        expected = []
        for b in range(25):
            drawn_examples = [e for e in range(8) for _ in range(int(example_BE[b, e]))]
            drawn_seeds = [s for s in range(3) for _ in range(int(seed_BS[b, s]))]
            means = {s: sum(values_ASE[arm, s, e] for e in drawn_examples) / 8 for s in range(3)}
            middle = sum(means.values()) / 3
            expected.append(middle + math.sqrt(3 / 2) * (sum(means[s] for s in drawn_seeds) / 3 - middle))
        np.testing.assert_allclose(Resampled(sheet=sheet).drawn(arm), expected, rtol=1e-12)


def test_stretched_seeds_have_the_unbiased_variance_of_their_mean():
    own_S = np.array([0.0, 1.0, 5.0])
    drawn_B = arm_means(np.broadcast_to(own_S, (20_000, 3)), (0, 1, 2), draws(3, 20_000, "x"))
    assert drawn_B.var() == pytest.approx(own_S.var(ddof=1) / 3, rel=0.03)


def test_one_seed_leaves_the_bootstrap_over_examples():
    values_ASE = noise(arms=1, seeds=1, examples=50)
    found = Resampled(sheet=sheet_of(values_ASE, resamples=2000)).estimate(0)
    normal = 1.96 * values_ASE.std() / math.sqrt(50)
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(normal, rel=0.06)
    assert found.mean == pytest.approx(values_ASE.mean())


def test_the_interval_of_a_share_ends_where_shares_do():
    values_ASE = np.array([0.001, 0.5])[None, :, None] * np.ones((1, 2, 5))
    sheet = sheet_of(values_ASE)
    wide = Resampled(sheet=sheet).estimate(0)
    share = Resampled(sheet=replace(sheet, share=True)).estimate(0)
    assert wide.low is not None and wide.low < 0 and share.low == 0 and share.high == 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Arms that are the same in truth, with both sources of variation: 95 % intervals, 5 % false separations in all."""
    held = wrong = 0
    trials = 120
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        values_ASE = 0.1 * rng.normal(size=(4, 3, 1)) + rng.normal(size=40) * 0.4 + 0.3 * rng.normal(size=(4, 3, 40))
        resampled = Resampled(sheet=sheet_of(values_ASE))
        one = resampled.estimate(0)
        assert one.low is not None and one.high is not None
        held += one.low <= 0 <= one.high
        wrong += any(pair.separated for pair in resampled.pairs.values())
    assert held / trials > 0.88 and wrong / trials < 0.1


def test_pairing_sees_what_single_intervals_cannot():
    values_ASE = noise(arms=2, seeds=3, examples=60, between=0.01)
    values_ASE[1] += 0.2
    resampled = Resampled(sheet=sheet_of(values_ASE))
    first, second = resampled.estimate(0), resampled.estimate(1)
    assert first.high is not None and second.low is not None and first.high > second.low
    pair = resampled.pairs[0, 1]
    assert pair.separated and pair.difference == pytest.approx(values_ASE[0].mean() - values_ASE[1].mean())


def test_pairs_are_compared_over_shared_seeds_and_borrow_training_variance():
    values_ASE = noise(arms=3, seeds=3, examples=40, between=0.4)
    sheet = sheet_of(values_ASE, seeds=[[0, 1, 2], [0, 1], [7]])
    pairs = Resampled(sheet=sheet).pairs
    shared = values_ASE[0, :2].mean() - values_ASE[1, :2].mean()
    assert pairs[0, 1].difference == pytest.approx(shared)
    alone = values_ASE[0].mean() - values_ASE[2, 0].mean()
    assert pairs[0, 2].difference == pytest.approx(alone)
    # One seed says nothing of training, but the arms beside it do.
    without = Resampled(sheet=sheet_of(values_ASE[[0, 2]][:, :1], seeds=[[0], [7]])).pairs[0, 1]
    assert pairs[0, 2].error > 1.5 * without.error


def test_identical_arms_are_never_separated():
    values_ASE = np.repeat(noise(arms=1), 2, axis=0)
    assert not Resampled(sheet=sheet_of(values_ASE)).pairs[0, 1].separated


def gap(difference, error=1.0, dof=1000.0):
    return Difference(difference=difference, variance=error**2, unit=None, own=0.0, share=1.0, dof=dof)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 3), st.floats(1, 2000)), min_size=1, max_size=9))
@settings(max_examples=80, deadline=None)
def test_holm_is_the_step_down_and_its_intervals_agree(made):
    found = holm({(0, n + 1): gap(*one) for n, one in enumerate(made)})
    chances = sorted((tail(d / e, f), n) for n, (d, e, f) in enumerate(made))
    going = True
    for done, (chance, n) in enumerate(chances):
        going = going and chance < 0.05 / (len(made) - done)
        pair = found[0, n + 1]
        assert pair.separated == going
        assert pair.separated == (abs(pair.difference) > pair.half_width * (1 - 1e-8)) or math.isclose(
            chance, pair.level
        )


@given(st.integers(2, 6), st.data())
@settings(max_examples=80, deadline=None)
def test_arms_share_a_letter_exactly_when_they_are_not_separated(arms, data):
    pairs = {
        (a, b): ComparedPair(difference=1.0, error=1.0, dof=9.0, level=0.05, separated=data.draw(st.booleans()))
        for a in range(arms)
        for b in range(a + 1, arms)
    }
    order = data.draw(st.permutations(range(arms)))
    marks = letters(order, pairs)
    for (a, b), pair in pairs.items():
        assert bool(set(marks[a]) & set(marks[b])) != pair.separated
    assert "a" in marks[order[0]]


@pytest.mark.parametrize(
    ("seeds", "counts"),
    [([5, 5], [3, 5]), ([10, 4, 7], [3, 4]), ([3, 3, 1], [3]), ([2, 2, 2], [2]), ([5, 1], []), ([4], [])],
)
def test_what_a_bench_resolves_is_said_of_the_seeds_that_all_arms_have(seeds, counts):
    sheet = sheet_of(noise(arms=len(seeds), seeds=max(seeds)), [list(range(count)) for count in seeds])
    text = resolved(sheet)
    assert ("Too few" in text) == (not counts)
    for count in counts:
        arms = [arm for arm, own in enumerate(seeds) if own > 1]
        found = half_widths(sheet, arms, range(count))
        assert len(found) == len(arms) * (len(arms) - 1) // 2
        assert f"{statistics.median(found):.3f} to each side with {count} seeds" in text


def test_what_is_resolved_is_what_the_interval_of_a_pair_is():
    """With two arms there is nothing to widen for: a difference as large as what is said is just separated."""
    sheet = sheet_of(noise(arms=2, seeds=6), [list(range(6))] * 2)
    (found,), ((_, pair),) = half_widths(sheet, range(2), range(6)), Resampled(sheet=sheet).pairs.items()
    assert found == pytest.approx(pair.half_width)
