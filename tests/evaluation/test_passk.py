"""pass@k against counting: how many of all choices of k answers hold a right one."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.evaluation.tasks.passk import pass_at_k
from limbeck.types import LimbeckError


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_it_is_the_share_of_choices_with_a_right_one(case):
    answers, right, k = case
    choices = list(combinations([True] * right + [False] * (answers - right), k))
    assert pass_at_k(answers, right, k) == pytest.approx(sum(any(c) for c in choices) / len(choices), abs=1e-15)


def test_large_counts_are_exact_enough():
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5, rel=1e-9)
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - (100 * 99 * 98) / (200 * 199 * 198), rel=1e-12)


@pytest.mark.parametrize(("answers", "right", "k"), [(1, 0, 2), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_what_cannot_be_estimated_is_refused(answers, right, k):
    with pytest.raises(LimbeckError, match=r"evaluate\.groups\.tasks\.samples"):
        pass_at_k(answers, right, k)
