"""Steps of the student's and of fixed responses, mixed by a share: GKD and ImitKD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.rollouts.mixed import MixedSource, SharePath
from limbeck.rollouts.registry import SOURCES, MixedResponses
from limbeck.rollouts.sources import OfflineSource, SourceContext, StepCounter, die
from limbeck.types import LimbeckError
from tests.sampling.writing import FakeSampler, base_of, own_of, played, prompts_of

SHIFT = SourceContext(step_rows=4, seed=11)


def mixed_of(
    folder: Path,
    share: tuple[float, float],
    *,
    seed: int = 3,
    refresh: int | None = 1,
    sampler: FakeSampler | None = None,
) -> MixedSource:
    base = base_of(prompts_of(10))
    return MixedSource(
        own_of(sampler or FakeSampler(), folder, refresh=refresh),
        OfflineSource(base, SHIFT),
        share=SharePath(start=share[0], end=share[1]),
        seed=seed,
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gkd_and_imitkd_as_they_are_written(tmp_path, share):
    """GKD (arXiv 2306.13649, algorithm 1): at each step u ~ U(0, 1); u < lambda: the student writes, else (X, Y).

    ImitKD (arXiv 2009.07253) is the same with forward KL; a share of 1 leaves the data out.
    """
    total = 60
    found = played(mixed_of(tmp_path / "a", (share, share)), range(total), total)
    own, base = own_of(FakeSampler(), tmp_path / "b"), OfflineSource(base_of(prompts_of(10)), SHIFT)
    written = 0
    for step, responses in enumerate(found):
        u = die(3, step).random()
        written += u < share
        assert responses == (own if u < share else base).step(StepCounter(step=step, total=total))
    assert abs(written - share * total) < 12
    authors = {r.author for step in found for r in step.values()}
    assert authors == {0.0: {"teacher"}, 0.5: {"teacher", "student"}, 1.0: {"student"}}[share]


def test_the_share_moves_in_a_line(tmp_path):
    total = 200
    response_source = mixed_of(tmp_path, (0.0, 1.0))
    own = [any(r.author == "student" for r in s.values()) for s in played(response_source, range(total), total)]
    assert response_source.metrics(StepCounter(step=50, total=201)) == {"share": 0.25}
    assert not own[0] and own[-1]
    # Expected are 12.5 and 87.5 of a hundred.
    assert sum(own[:50]) < 25 < 75 < 2 * sum(own[150:])


@pytest.mark.parametrize("seed", range(12))
def test_a_preview_leaves_no_response_of_its_weights_behind(tmp_path, seed):
    """The last step it saw may be the first of the student's, which is written with the weights of its own time."""
    found = []
    for count in (0, 3):
        sampler = FakeSampler()
        response_source = mixed_of(tmp_path, (0.5, 0.5), seed=seed, sampler=sampler)
        assert len(response_source.preview(count, 9)) == count
        found.append(played(response_source, range(9), 9, train=sampler))
    assert found[0] == found[1]


@pytest.mark.parametrize("base", [200, 10])
def test_the_exponential_share_is_that_of_imitkds_authors(base):
    """Their `get_beta` is the share of the data's responses: base ** (-step / steps)."""
    path = SharePath(start=0.0, end=1 - 1 / base, shape="exponential")
    for step in range(11):
        assert path.at(step / 10) == pytest.approx(1 - base ** (-step / 10), abs=1e-12)


def test_a_path_has_its_ends_whatever_its_shape():
    for shape in ("linear", "exponential"):
        path = SharePath(start=0.2, end=0.9, shape=shape)
        assert (path.at(0), path.at(1)) == pytest.approx((0.2, 0.9))
        assert all(path.at(n / 20) < path.at((n + 1) / 20) for n in range(20))


def test_what_the_student_will_write_is_expected_by_the_path():
    options: dict[str, Any] = {"share": 0.0, "share_end": 0.995}
    assert MixedResponses(**options).expected_share == pytest.approx(0.4975)
    # The integral of 1 - 200 ** -f.
    assert MixedResponses(**options, share_shape="exponential").expected_share == pytest.approx(0.812, abs=2e-3)
    assert MixedResponses(share=0.3).expected_share == pytest.approx(0.3)
    assert [SOURCES[name]().expected_share for name in ("student", "replay", "pairs")] == [1.0, 0.2, 1.0]  # type: ignore[attr-defined]


def test_mixed_steps_follow_the_seed_and_read_their_rounds(tmp_path):
    def who(seed: int, folder: str) -> list[bool]:
        steps = played(mixed_of(tmp_path / folder, (0.5, 0.5), seed=seed, refresh=3), range(30), 30)
        return [any(r.author == "student" for r in step.values()) for step in steps]

    assert who(1, "a") == who(1, "a") == who(1, "b") != who(2, "c")


@pytest.mark.parametrize("share", [(-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_a_share_that_is_no_probability_is_refused(tmp_path, share):
    with pytest.raises(LimbeckError, match=r"share is .*expected a probability from 0"):
        mixed_of(tmp_path, share)
