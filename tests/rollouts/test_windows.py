"""Windows of steps: each step is in one, none is larger than the limit, and each is opened once, before its steps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from limbeck.rollouts.order import Plan
from limbeck.rollouts.sources import OfflineSource, SourceContext, StepCounter
from limbeck.rollouts.windows import Window, WindowedSource, Windows
from limbeck.types import LimbeckError
from tests.sampling.writing import base_of, prompts_of


@pytest.mark.parametrize("limit", [70, 100, 300, 10_000])
def test_windows_are_as_long_as_the_limit_lets_them(limit: int) -> None:
    """Rows that come again in a window are counted once, as they are written once."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 20, 30)
    plan = Plan(lengths=rng.integers(1, 9, 30), step_rows=4, seed=3)
    total = 3 * plan.steps_per_epoch - 2

    def size(first: int, end: int) -> int:
        return int(sum(sizes[row] for row in {row for step in range(first, end) for row in plan.at(step)}))

    firsts = Windows(plan=plan, bytes_of=sizes, limit=limit).of(total)
    assert firsts[0] == 0 and firsts[-1] == total and firsts == sorted(set(firsts))
    assert all(size(first, end) <= limit for first, end in pairwise(firsts))
    assert all(size(first, end + 1) > limit for first, end in pairwise(firsts) if end < total)


def test_a_step_that_is_too_large_is_named() -> None:
    plan = Plan(lengths=[3, 3, 3], step_rows=1, seed=0)
    small = [int(row) for row in range(3) if row not in plan.at(1)]
    sizes = np.full(3, 2**30)
    sizes[small] = 5
    with pytest.raises(LimbeckError, match=r"the signal of step 2 alone takes 1 GiB; raise it"):
        Windows(plan=plan, bytes_of=sizes, limit=2**29).of(3)


@pytest.mark.parametrize("begin", [0, 4])
def test_a_window_is_opened_before_its_first_step_and_again_after_a_restart(begin: int) -> None:
    base = base_of(prompts_of(10))
    context = SourceContext(step_rows=4, seed=11)
    opened: list[tuple[Window, Window | None]] = []
    held: set[str] = set()

    def open_window(window: Window, then: Window | None) -> None:
        opened.append((window, then))
        held.clear()
        held.update(r.id for r in window.responses())
        assert len(held) == len(window.responses())

    source = OfflineSource(base, context)
    windowed = WindowedSource(source, open_window, bytes_of=np.full(10, 10), limit=80)
    assert windowed.preview(3, 9) == source.preview(3, 9) and not opened
    for step in range(begin, 9):
        by_row = windowed.step(StepCounter(step=step, total=9))
        assert by_row == source.step(StepCounter(step=step, total=9))
        assert {r.id for r in by_row.values()} <= held
    assert opened[0][0].first <= begin and opened[-1][0].last == 8
    # Each is told of the one that is opened next.
    assert [then for _, then in opened] == [*(window for window, _ in opened[1:]), None]
    for window, then in opened[:-1]:
        assert then is not None and (then.number, then.first) == (window.number + 1, window.last + 1)
