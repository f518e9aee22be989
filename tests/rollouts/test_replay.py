"""DistiLLM's replay (arXiv 2402.03898, algorithm 1 and its code) against the algorithm written down once more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from limbeck.rollouts.replay import ReplaySettings, ReplaySource
from limbeck.rollouts.sources import OfflineSource, SourceContext, StepCounter, die
from limbeck.types import LimbeckError, Response
from tests.sampling.writing import FakeSampler, base_of, own_of, played, prompts_of

ROWS, TOTAL = 4, 60
# Ten prompts in steps of four rows: three steps an epoch, so 20 epochs and a held-out loss before each of them.
LOSSES = (2.0, 2.05, 2.11, 2.3, 2.35, 1.0, 2.39, 2.5, 2.65, 3.0, *[3.0] * 10)


def replay_of(folder: Path, **options: Any) -> ReplaySource:
    base = OfflineSource(base_of(prompts_of(10)), SourceContext(step_rows=ROWS, seed=11))
    settings = ReplaySettings(**({"share": 0.3, "capacity": 10} | options))
    return ReplaySource(own_of(FakeSampler(), folder), base, settings, step_rows=ROWS, seed=9)


def driven(
    response_source: ReplaySource, steps: range, losses: Sequence[float] = LOSSES
) -> list[tuple[dict[int, Response], float, list[Response]]]:
    """Responses, phi and the buffer of each step, the held-out loss told before each epoch as the loop does."""
    found = []
    for step in steps:
        if step % response_source.steps_per_epoch == 0:
            response_source.validated(losses[step // response_source.steps_per_epoch])
        responses = response_source.step(StepCounter(step=step, total=TOTAL))
        found.append((responses, response_source.phi, list(response_source.buffer)))
    return found


def ids_of(responses: dict[int, Response]) -> Counter[Response]:
    return Counter(responses.values())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("capacity", [2, 10, 40])
@pytest.mark.parametrize("decay", ["decreasing", "constant", "increasing"])
def test_distillm_as_it_is_written(tmp_path, decay, capacity, share):
    found = driven(replay_of(tmp_path / "a", decay=decay, capacity=capacity, share=share), range(TOTAL))
    own, base = (
        own_of(FakeSampler(), tmp_path / "b"),
        OfflineSource(base_of(prompts_of(10)), SourceContext(step_rows=ROWS, seed=11)),
    )
    phi, previous, buffer, took = share, LOSSES[0], [], Counter()
    for step, (responses, phi_found, buffer_found) in enumerate(found):
        if step % 3 == 0 and LOSSES[step // 3] > previous + 0.1:
            phi, previous = min(phi + 0.1, 1.0), LOSSES[step // 3]
        u, t_over_t = die(9, step).random(), step / TOTAL
        fresh = {"decreasing": phi * (1 - t_over_t), "constant": phi * 0.5, "increasing": phi * t_over_t}[decay]
        clock = StepCounter(step=step, total=TOTAL)
        if u < fresh or (u < phi and len(buffer) < capacity):
            took["generate"] += 1
            assert responses == own.step(clock)
            buffer = [*buffer, *responses.values()][-capacity:]
        elif u < phi:
            took["buffer"] += 1
            assert sum(ids_of(responses).values()) == min(ROWS, capacity)
            assert ids_of(responses) <= Counter(buffer)
        else:
            took["data"] += 1
            assert responses == base.step(clock)
        assert phi_found == pytest.approx(phi)
        assert buffer_found == buffer
    if share:
        # A buffer of forty is full late or never.
        assert set(took) >= ({"generate", "buffer"} if capacity < 40 else {"generate"})
        assert all(count > 1 for count in took.values())


def test_while_the_buffer_is_not_full_every_step_is_written(tmp_path):
    # An increasing share of fresh responses is next to nothing at the start: only the buffer asks for them.
    found = driven(replay_of(tmp_path, share=1.0, capacity=17, decay="increasing"), range(12), [2.0] * 20)
    full = next(step for step, (_, _, buffer) in enumerate(found) if len(buffer) == 17)
    assert full in (4, 5)
    written = [r for responses, _, _ in found[: full + 1] for r in responses.values()]
    assert len(set(written)) == len(written) and written[-17:] == found[full][2]
    again = [set(responses.values()) <= set(written) for responses, _, _ in found[full + 1 :]]
    assert sum(again) > 3


def test_all_of_the_buffer_is_drawn_from(tmp_path):
    response_source = replay_of(tmp_path, share=1.0, capacity=10, decay="increasing")
    driven(response_source, range(3), [2.0] * 20)
    assert len(response_source.buffer) == 10
    # At the start of the clock an increasing share writes nothing fresh.
    drawn: Counter[Response] = Counter()
    for step in range(400):
        response_source.seed = step
        drawn.update(response_source.step(StepCounter(step=0, total=TOTAL)).values())
    assert drawn.keys() == set(response_source.buffer) and drawn.total() == 4 * 400
    # Each has 160 on average, with a standard deviation below 10.
    assert all(120 < count < 200 for count in drawn.values())


def test_drawn_responses_are_the_longest_first(tmp_path):
    for responses, _, _ in driven(replay_of(tmp_path, share=1.0, capacity=8), range(TOTAL)):
        lengths = [r.length for r in responses.values()]
        assert lengths == sorted(lengths, reverse=True)


def test_the_share_grows_by_hand(tmp_path):
    response_source, shares = replay_of(tmp_path, share=0.75, tolerance=0.1, bump=0.1), []
    for loss in (2.0, 2.05, 2.11, 2.2, 2.22, 1.0, 2.3, 2.33, 2.5, 9.0):
        response_source.validated(loss)
        shares.append(response_source.phi)
    # It is compared with the loss at the last growth, not with the lowest or the previous one.
    assert shares == pytest.approx([0.75, 0.75, 0.85, 0.85, 0.95, 0.95, 0.95, 1.0, 1.0, 1.0])
    assert response_source.metrics(StepCounter(step=0, total=1)) == {"share": 1.0, "buffer": 0.0}
    assert response_source.wants_validation


def test_the_share_grows_above_the_lowest_loss(tmp_path):
    response_source, shares = replay_of(tmp_path, share=0.2, tolerance=0.05, compare_with="lowest"), []
    losses = (3.0, 2.5, 2.54, 2.56, 2.4, 2.6, 2.61, 2.66)
    for loss in losses:
        response_source.validated(loss)
        shares.append(response_source.phi)
    # Never above where it began, yet it rises four times; after a growth the loss of then is what counts.
    assert shares == pytest.approx([0.2, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5])
    counts = response_source.counts(StepCounter(step=0, total=1))
    assert counts == {"replayed": 0, "validations": 7, "rises": 5, "growths": 3}
    falls = replay_of(tmp_path, share=0.2, tolerance=0.05)
    for loss in losses:
        falls.validated(loss)
    assert falls.phi == 0.2 and falls.counts(StepCounter(step=0, total=1))["growths"] == 0


def test_what_is_replayed_is_counted(tmp_path):
    response_source = replay_of(tmp_path, share=0.9, capacity=8)
    drawn = 0
    for step in range(TOTAL):
        before = list(response_source.buffer)
        responses = response_source.step(StepCounter(step=step, total=TOTAL))
        mine = [r for r in responses.values() if r.author == "student"]
        drawn += len(mine) if list(response_source.buffer) == before else 0
    assert response_source.counts(StepCounter(step=0, total=1))["replayed"] == drawn > 0


def test_the_held_out_loss_is_due_as_often_as_asked(tmp_path):
    assert replay_of(tmp_path).validation_steps == replay_of(tmp_path).steps_per_epoch == 3
    assert replay_of(tmp_path, validation_steps=2).validation_steps == 2


@pytest.mark.parametrize("stop", [1, 7, 31])
def test_a_replay_continues_from_its_state_in_json(tmp_path, stop):
    straight = driven(replay_of(tmp_path / "a", share=0.6), range(TOTAL))
    broken = replay_of(tmp_path / "b", share=0.6)
    driven(broken, range(stop))
    state = json.loads(json.dumps(broken.state()))
    later = replay_of(tmp_path / "c", share=0.6)
    later.step(StepCounter(step=0, total=TOTAL))
    later.restore(state)
    assert list(later.buffer) == list(broken.buffer) == straight[stop - 1][2]
    assert driven(later, range(stop, TOTAL)) == straight[stop:]
    # The state matters: a fresh one goes elsewhere.
    assert driven(replay_of(tmp_path / "d", share=0.6), range(stop, TOTAL)) != straight[stop:]


def test_a_share_that_is_no_probability_is_refused():
    for share in (-0.1, 1.5):
        with pytest.raises(LimbeckError, match=rf"share is {share}: expected a probability from 0 to 1"):
            ReplaySettings(share=share)


def test_a_buffer_larger_than_the_memory_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match=r"a buffer of 100000000000 responses of up to 20 tokens .*source.capacity"):
        replay_of(tmp_path, capacity=10**11)


@pytest.mark.parametrize("seed", range(12))
def test_a_preview_leaves_no_response_of_its_weights_behind(tmp_path, seed):
    """The last step it saw may be the first that the student writes, which is written with the weights of its time."""
    found = []
    for count in (0, 3):
        sampler = FakeSampler()
        base = OfflineSource(base_of(prompts_of(10)), SourceContext(step_rows=ROWS, seed=11))
        settings = ReplaySettings(share=0.4, capacity=10)
        source = ReplaySource(own_of(sampler, tmp_path), base, settings, step_rows=ROWS, seed=seed)
        assert len(source.preview(count, 9)) == count
        found.append(played(source, range(9), 9, train=sampler))
    assert found[0] == found[1]
