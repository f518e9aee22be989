"""Of each prompt the teacher's response and the student's, together in one step and in one micro-batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from limbeck.rollouts.collate import collate, micro_batches
from limbeck.rollouts.pairs import PairedSource
from limbeck.rollouts.sources import SourceContext, StepCounter
from limbeck.types import LimbeckError, Response, Sampling
from tests.sampling.writing import FakeSampler, asked_in, base_of, pen_of, played, prompts_of

TEACHERS = Sampling(max_new_tokens=12, seed=77)


def pairs_of(
    folder: Path,
    student: FakeSampler,
    teacher: FakeSampler | None = None,
    *,
    base: list[Response] | None = None,
    step_rows: int = 8,
    refresh: int | None = None,
) -> PairedSource:
    """Pairs of ten prompts: four of them in a step, three steps an epoch."""
    prompts = prompts_of(10)
    return PairedSource(
        base_of(prompts) if base is None else base,
        prompts,
        pen_of(student, folder, refresh=refresh),
        SourceContext(step_rows=step_rows, seed=11),
        teacher=teacher,
        teacher_sampling=TEACHERS if teacher else None,
    )


def test_both_responses_of_a_prompt_stand_side_by_side_the_teachers_first(tmp_path):
    steps = played(pairs_of(tmp_path, FakeSampler()), range(3), 9)
    for step in steps:
        both = list(step.values())
        assert [r.author for r in both] == ["teacher", "student"] * (len(both) // 2)
        pairs = list(zip(both[::2], both[1::2], strict=True))
        assert all((t.prompt_id, t.prompt_ids) == (s.prompt_id, s.prompt_ids) for t, s in pairs)
        assert list(step) == list(range(len(both)))
        longest = [max(t.length, s.length) for t, s in pairs]
        assert longest == sorted(longest, reverse=True)
    assert Counter(r.prompt_id for s in steps for r in s.values()) == {f"p{i}": 2 for i in range(10)}
    assert sorted(len(step) for step in steps) == [4, 8, 8]


@pytest.mark.parametrize(("rows_per_device", "ranks"), [(2, 1), (4, 1), (8, 1), (2, 3), (6, 1)])
def test_pairs_are_never_cut_apart(tmp_path, rows_per_device, ranks):
    for step in played(pairs_of(tmp_path, FakeSampler()), range(3), 9):
        seen = 0
        for rank in range(ranks):
            for micro in micro_batches(tuple(step), rows_per_device=rows_per_device, rank=rank, ranks=ranks):
                if micro:
                    batch = collate(step, micro, pad_id=0)
                    assert batch.partners == tuple(i ^ 1 for i in range(len(micro)))
                    assert batch.by_student_B.tolist() == [False, True] * (len(micro) // 2)
                    seen += len(micro)
        assert seen == len(step)


def test_rounds_are_written_once_and_the_teachers_first_answers_are_the_first_round(tmp_path):
    student, teacher = FakeSampler(), FakeSampler(author="teacher", weights=900)
    steps = played(pairs_of(tmp_path, student, teacher), range(9), 9, train=student)
    # Three epochs: the student writes in each, the teacher in the last two.
    assert set(student.drawn.values()) == set(teacher.drawn.values()) == {1}
    assert (student.drawn.total(), teacher.drawn.total()) == (30, 20)
    first = {r for step in steps[:3] for r in step.values() if r.author == "teacher"}
    assert first == set(base_of(prompts_of(10)))
    for epoch in range(3):
        of_epoch = [r for step in steps[3 * epoch : 3 * epoch + 3] for r in step.values()]
        assert {r.response_ids[0] for r in of_epoch if r.author == "student"} == {3 * epoch}
        assert {r.response_ids[0] for r in of_epoch if r.author == "teacher"} == {900 if epoch else 999}
    later = [FakeSampler(weights=1), FakeSampler(author="teacher", weights=2)]
    assert played(pairs_of(tmp_path, *later), range(9), 9) == steps
    assert not later[0].drawn and not later[1].drawn


def test_a_teacher_that_does_not_write_again_keeps_its_answers(tmp_path):
    base = base_of(prompts_of(10))
    steps = played(pairs_of(tmp_path, FakeSampler()), range(9), 9)
    assert Counter(r for s in steps for r in s.values() if r.author == "teacher") == dict.fromkeys(base, 3)


def test_a_prompt_that_the_teacher_did_not_answer_is_left_out(tmp_path):
    student = FakeSampler()
    response_source = pairs_of(tmp_path, student, base=base_of(prompts_of(10))[:5])
    steps = played(response_source, range(2), 2)
    assert response_source.prompts == {f"p{i}" for i in range(5)} == asked_in(steps[0]) | asked_in(steps[1])
    assert (response_source.steps_per_epoch, student.drawn.total()) == (2, 5)


def test_a_round_of_several_epochs_begins_with_them(tmp_path):
    student = FakeSampler()
    response_source = pairs_of(tmp_path, student, refresh=6)
    played(response_source, range(12), 12)
    assert [s for s in range(12) if response_source.starts_round(StepCounter(step=s, total=12))] == [0, 6]
    assert student.drawn.total() == 20


def test_what_cannot_be_pairs_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match=r"a step of 7 responses cannot be made of pairs: .*an even number"):
        pairs_of(tmp_path, FakeSampler(), step_rows=7)
    with pytest.raises(LimbeckError, match=r"refresh is 4 steps and an epoch of pairs has 3: .*refresh=epoch"):
        pairs_of(tmp_path, FakeSampler(), refresh=4)
