"""The student's own responses: a function of the step and the weights, nothing written twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from limbeck.rollouts.order import Plan
from limbeck.rollouts.sources import SourceContext, StepCounter
from limbeck.rollouts.student import StudentSource
from limbeck.types import Interrupted, LimbeckError, Response
from tests.sampling.writing import FakeSampler, Together, asked_in, on_ranks, own_of, pen_of, played, prompts_of

SHIFT = SourceContext(step_rows=4, seed=11)
# Ten prompts in steps of four rows: an epoch is three steps, the last of two rows in whatever place it has.
TOTAL = 9


def seeds(sampler: FakeSampler) -> set[int]:
    return {seed for _, seed in sampler.drawn}


def test_nothing_to_answer_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match="no prompts for the student"):
        StudentSource([], pen_of(FakeSampler(), tmp_path), SHIFT)


# --- the student's own, step by step ---


def test_a_step_has_the_same_responses_whatever_was_asked_before(tmp_path):
    straight = played(own_of(FakeSampler(), tmp_path / "a"), range(TOTAL), TOTAL)
    other = own_of(FakeSampler(), tmp_path / "b")
    for step in (7, 0, 7, 4):
        assert other.step(StepCounter(step=step, total=TOTAL)) == straight[step]


def test_a_step_asked_for_again_is_not_written_again(tmp_path):
    sampler = FakeSampler()
    own = own_of(sampler, tmp_path)
    played(own, range(2), TOTAL)
    before = sampler.drawn.copy()
    assert before.total() > 0
    played(own, range(1, 2), TOTAL)
    assert sampler.drawn == before


def test_every_step_asks_its_prompts_with_random_numbers_of_its_own(tmp_path):
    sampler = FakeSampler()
    steps = played(own_of(sampler, tmp_path), range(TOTAL), TOTAL)
    plan = Plan(lengths=tuple(len(p.ids) for p in prompts_of(10)), step_rows=4, seed=11)
    assert [asked_in(step) for step in steps] == [{f"p{row}" for row in plan.at(i)} for i in range(TOTAL)]
    assert len(seeds(sampler)) == TOTAL and set(sampler.drawn.values()) == {1}
    # Three epochs: each prompt was answered three times, each time in other words.
    for prompt in prompts_of(10):
        answers = [r.response_ids for step in steps for r in step.values() if r.prompt_id == prompt.id]
        assert len(answers) == 3 and len(set(answers)) > 1
    assert all(list(step) == list(range(len(step))) for step in steps)
    lengths = [[r.length for r in step.values()] for step in steps]
    assert lengths == [sorted(row, reverse=True) for row in lengths]


def test_every_step_is_written_with_the_weights_as_they_are(tmp_path):
    sampler = FakeSampler()
    own = own_of(sampler, tmp_path)
    for number, step in enumerate(played(own, range(TOTAL), TOTAL, train=sampler)):
        assert {r.response_ids[0] for r in step.values()} == {number}
    assert not any(own.starts_round(StepCounter(step=s, total=TOTAL)) for s in range(TOTAL))
    assert list(tmp_path.iterdir()) == []


def test_fewer_prompts_than_rows_make_short_steps(tmp_path):
    sampler = FakeSampler()
    own = own_of(sampler, tmp_path, prompts=3, step_rows=8)
    steps = played(own, range(4), 4)
    assert own.steps_per_epoch == 1
    assert all(asked_in(step) == {"p0", "p1", "p2"} and len(step) == 3 for step in steps)
    assert len(seeds(sampler)) == 4


# --- rounds ---


@pytest.mark.parametrize(("refresh", "steps"), [(2, 2), (3, 3), (4, 4), (None, 3), (6, 6)])
def test_a_round_is_written_once_and_then_read(tmp_path, refresh, steps):
    sampler = FakeSampler()
    own = own_of(sampler, tmp_path, refresh=refresh)
    found = played(own, range(TOTAL), TOTAL, train=sampler)
    begins = [step for step in range(TOTAL) if own.starts_round(StepCounter(step=step, total=TOTAL))]
    assert begins == list(range(0, TOTAL, steps))
    # All responses are those of the weights their round began with.
    assert [{r.response_ids[0] for r in step.values()} for step in found] == [
        {s // steps * steps} for s in range(TOTAL)
    ]
    assert len(seeds(sampler)) == len(begins) and set(sampler.drawn.values()) == {1}
    # Of a round that is on disk nothing is written anew, whatever the weights are by then.
    late = FakeSampler(weights=500)
    assert played(own_of(late, tmp_path, refresh=refresh), range(TOTAL), TOTAL) == found
    assert not late.drawn


@pytest.mark.parametrize("refresh", [None, 3, 6])
def test_rounds_of_whole_epochs_are_cut_by_the_lengths_of_their_responses(tmp_path, refresh):
    steps = played(own_of(FakeSampler(), tmp_path, refresh=refresh), range(TOTAL), TOTAL)
    for epoch in range(3):
        of_epoch = steps[3 * epoch : 3 * epoch + 3]
        assert Counter(r.prompt_id for s in of_epoch for r in s.values()) == Counter(f"p{i}" for i in range(10))
        lengths = sorted(([r.length for r in step.values()] for step in of_epoch), reverse=True)
        flat = [length for step in lengths for length in step]
        assert flat == sorted(flat, reverse=True)


def test_two_epochs_of_a_round_hold_the_same_responses_in_another_order(tmp_path):
    steps = played(own_of(FakeSampler(), tmp_path, refresh=6), range(12), 12)

    def epoch(number: int) -> list[Response]:
        return [r for step in steps[3 * number : 3 * number + 3] for r in step.values()]

    by_prompt = [{r.prompt_id: r for r in epoch(number)} for number in range(4)]
    assert by_prompt[0] == by_prompt[1] != by_prompt[2] == by_prompt[3]
    assert epoch(0) != epoch(1)


def test_a_last_round_that_is_cut_short_answers_only_what_will_be_used(tmp_path):
    sampler = FakeSampler()
    own = own_of(sampler, tmp_path, prompts=40, refresh=3)
    found = played(own, range(7), 7)
    last = {prompt for (prompt, seed) in sampler.drawn if seed == max(seeds(sampler))}
    assert last == asked_in(found[6]) and len(last) == 4


def test_a_prompt_that_comes_twice_in_a_round_has_one_response(tmp_path):
    sampler = FakeSampler()
    # Four steps over epochs of three: some prompts come again in the fourth.
    found = played(own_of(sampler, tmp_path, refresh=4), range(4), 8)
    answers: dict[str, set[Any]] = {}
    for step in found:
        for response in step.values():
            answers.setdefault(response.prompt_id, set()).add(response)
    assert Counter(r.prompt_id for s in found for r in s.values()).most_common(1)[0][1] == 2
    assert all(len(same) == 1 for same in answers.values())


def test_a_round_that_was_stopped_continues_with_the_next_batch(tmp_path):
    first, told = FakeSampler(), []
    stopping = own_of(
        first, tmp_path, refresh=None, should_stop=lambda: len(told) == 2, report=lambda *what: told.append(what)
    )
    with pytest.raises(Interrupted, match="student responses of round 0"):
        played(stopping, range(1), TOTAL)
    assert told == [("student", 4, 10), ("student", 8, 10)]
    second = FakeSampler()
    steps = played(own_of(second, tmp_path, refresh=None), range(3), TOTAL)
    assert first.drawn.total() == 8 and second.drawn.total() == 2 and not first.drawn & second.drawn
    assert steps == played(own_of(FakeSampler(), tmp_path / "other", refresh=None), range(3), TOTAL)


def test_a_batch_that_was_changed_before_the_round_was_whole_is_not_trained_on(tmp_path):
    told = []
    stopping = own_of(
        FakeSampler(), tmp_path, refresh=None, should_stop=lambda: told, report=lambda *what: told.append(what)
    )
    with pytest.raises(Interrupted):
        played(stopping, range(1), TOTAL)
    path = next(tmp_path.rglob("00000.jsonl"))
    whole = path.read_text()
    at = whole.index("response_ids") + len('response_ids": [')
    path.write_text(f"{whole[:at]}{(int(whole[at]) + 1) % 10}{whole[at + 1 :]}")
    with pytest.raises(LimbeckError, match=rf"{path} is damaged \(its sha256 .*; delete {path} and run the same"):
        played(own_of(FakeSampler(), tmp_path, refresh=None), range(3), TOTAL)
    path.unlink()
    played(own_of(FakeSampler(), tmp_path, refresh=None), range(3), TOTAL)
    assert path.read_text() == whole


@pytest.mark.parametrize("refresh", [1, 2, None])
def test_ranks_share_the_writing_and_end_with_the_same_responses(tmp_path, refresh):
    ranks, samplers = 3, [FakeSampler(batch_size=2) for _ in range(3)]

    def work(world: Together) -> list[dict[int, Response]]:
        rollout = pen_of(samplers[world.rank], tmp_path / "many", refresh=refresh, world=world)
        own = StudentSource(prompts_of(10), rollout, SourceContext(step_rows=4, seed=11, world=world))
        return played(own, range(6), 6)

    found = on_ranks(ranks, work)
    alone = played(own_of(FakeSampler(), tmp_path / "one", refresh=refresh), range(6), 6)
    assert found == [alone] * ranks
    together = sum((sampler.drawn for sampler in samplers), Counter())
    assert set(together.values()) == {1} and all(sampler.drawn for sampler in samplers)


# --- the length limit grows ---


@pytest.mark.parametrize(
    ("refresh", "limits"), [(1, [2, 4, 7, 10, 12]), (2, [2, 2, 7, 7, 12]), (None, [2, 2, 2, 10, 10])]
)
def test_the_length_limit_grows_in_a_line_from_round_to_round(tmp_path, refresh, limits):
    own = own_of(FakeSampler(), tmp_path, refresh=refresh, first_tokens=2)
    found = [{r.sampling.max_new_tokens for r in s.values() if r.sampling} for s in played(own, range(5), 5)]
    # 2 + 10 s / 4 at the step s a round begins with, halves to the even neighbour.
    assert found == [{limit} for limit in limits]


def test_a_run_of_one_step_begins_at_the_first_limit(tmp_path):
    (step,) = played(own_of(FakeSampler(), tmp_path, first_tokens=2), range(1), 1)
    assert {r.sampling.max_new_tokens for r in step.values() if r.sampling} == {2}
