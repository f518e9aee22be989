"""The next step where a source knows it before the present one is over: what the step will be, and nothing is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from limbeck.rollouts.mixed import MixedSource, SharePath
from limbeck.rollouts.pairs import PairedSource
from limbeck.rollouts.replay import ReplaySettings, ReplaySource
from limbeck.rollouts.sources import OfflineSource, ResponseSource, SourceContext, StepCounter, known_step_of
from limbeck.rollouts.windows import WindowedSource
from tests.sampling.writing import FakeSampler, base_of, own_of, pen_of, prompts_of

CONTEXT, TOTAL = SourceContext(step_rows=4, seed=11), 9
BASE = base_of(prompts_of(10))


def mixed(refresh: int) -> Callable[[FakeSampler, Path], ResponseSource]:
    def make(sampler: FakeSampler, folder: Path) -> ResponseSource:
        own = own_of(sampler, folder, refresh=refresh)
        return MixedSource(own, OfflineSource(BASE, CONTEXT), share=SharePath(start=0.5, end=0.5), seed=7)

    return make


def replay(sampler: FakeSampler, folder: Path) -> ResponseSource:
    settings = ReplaySettings(share=0.3, capacity=10)
    return ReplaySource(own_of(sampler, folder), OfflineSource(BASE, CONTEXT), settings, step_rows=4, seed=9)


def windowed(sampler: FakeSampler, folder: Path) -> ResponseSource:
    return WindowedSource(OfflineSource(BASE, CONTEXT), lambda window, then: None, bytes_of=np.full(10, 10), limit=80)


def paired(sampler: FakeSampler, folder: Path) -> ResponseSource:
    return PairedSource(BASE, prompts_of(10), pen_of(sampler, folder, refresh=None), CONTEXT)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda sampler, folder: OfflineSource(BASE, CONTEXT), "12345678"),
        (windowed, "1.34.67."),
        (lambda sampler, folder: own_of(sampler, folder, refresh=1), "........"),
        (lambda sampler, folder: own_of(sampler, folder, refresh=4), "123.567."),
        (mixed(4), "123.5678"),
        (mixed(1), "12.....8"),
        (replay, "........"),
        (paired, "1234.678"),
    ],
    ids=["offline", "windowed", "own", "rounds", "mixed rounds", "mixed", "replay", "paired"],
)
def test_a_known_step_is_what_the_step_will_be(
    tmp_path: Path, make: Callable[[FakeSampler, Path], ResponseSource], known: str
) -> None:
    sampler, found = FakeSampler(), ""
    source = make(sampler, tmp_path)
    for step in range(TOTAL - 1):
        sampler.weights = step
        source.step(StepCounter(step=step, total=TOTAL))
        following = StepCounter(step=step + 1, total=TOTAL)
        before = (sampler.drawn.copy(), json.dumps(source.state()), sorted(tmp_path.rglob("*")))
        ahead = known_step_of(source, following)
        assert before == (sampler.drawn, json.dumps(source.state()), sorted(tmp_path.rglob("*")))
        found += "." if ahead is None else str(step + 1)
        if ahead is not None:
            assert list(ahead.items()) == list(source.step(following).items())
    assert found == known
