"""What is better, and who goes on."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.sweep.ranking import badness, best, beyond, survivors
from limbeck.types import LimbeckError

STANDING = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(-5, 5), min_size=1, max_size=20)


def test_directions() -> None:
    means = {"forward_kl": 0.4, "top1_agreement": 0.7, "student_entropy": 1.2, "teacher_entropy": 1.5}
    assert badness("forward_kl", means) == 0.4
    assert badness("top1_agreement", means) == -0.7
    # Nearer to the teacher's is better, from both sides.
    assert badness("student_entropy", means) == pytest.approx(0.3)
    assert badness("student_entropy", means | {"student_entropy": 1.9}) == pytest.approx(0.4)


def test_under_a_condition() -> None:
    means = {"student_entropy@student": 2.0, "teacher_entropy@student": 1.0, "teacher_entropy": 9.0}
    assert badness("student_entropy@student", means) == 1.0


@pytest.mark.parametrize("metric", ["forward_kl", "student_entropy"])
def test_what_was_not_measured(metric: str) -> None:
    with pytest.raises(LimbeckError, match=r"was not measured \(but .*rouge_l.*evaluate.groups"):
        badness(metric, {"rouge_l": 0.1, "student_entropy": 1.0})


@given(STANDING, st.floats(0.01, 0.99))
def test_survivors_are_the_best(standing: dict[str, float], keep: float) -> None:
    found = survivors(standing, keep)
    assert len(found) == math.ceil(round(keep * len(standing), 6)) >= 1
    assert found == [name for name in standing if name in found]
    out = [standing[name] for name in standing if name not in found]
    assert not out or max(standing[name] for name in found) <= min(out)


def test_equals_in_the_order_of_the_sweep() -> None:
    assert survivors({"b": 1.0, "a": 1.0, "c": 1.0}, 0.5) == ["b", "a"]
    assert best([2.0, 1.0, 1.0]) == 1
    assert survivors({}, 0.5) == []


def test_one_step_beyond_the_end() -> None:
    assert beyond([1e-4, 3e-4, 9e-4], 9e-4) == 2.7e-3
    assert beyond([4e-3, 1e-3], 1e-3) == 2.5e-4
    assert beyond([1e-4, 3e-4, 9e-4], 3e-4) is None
    # No ratio to go by: one value, a zero, a name.
    assert beyond([1e-4], 1e-4) is None
    assert beyond([0.0, 0.1], 0.1) is None
    assert beyond(["fkl", "rkl"], "rkl") is None
    assert beyond([True, 2], 2) is None
    # Of whole numbers a whole one, or none.
    assert beyond([2, 4], 4) == 8 and isinstance(beyond([2, 4], 4), int)
    assert beyond([4, 8], 4) == 2 and beyond([1, 4], 1) is None
    assert beyond([2, 4.0], 4.0) == 8.0
