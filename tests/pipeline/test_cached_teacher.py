"""The teacher of a training with rounds: what it said of kept responses is read, and is what it would say now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limbeck.pipeline.cached_teacher import CachedTeacher
from limbeck.rollouts.collate import collate
from limbeck.teachers.chosen import StudentsChoice
from limbeck.teachers.store.base import Frame
from limbeck.teachers.store.dense import Hidden
from limbeck.types import DenseSignal, Response, TokenBatch
from tests.training.play import tiny_responses, tiny_teacher

FRAME = Frame(
    vocab_size=tiny_teacher().head.vocab_size, width=tiny_teacher().head.weight_VD.shape[1], temperatures=(1.0,)
)


class Counting:
    """A teacher in this process that counts what it is asked."""

    def __init__(self) -> None:
        self.teacher, self.asked = tiny_teacher(), 0
        self.head, self.model = self.teacher.head, self.teacher.model

    def reads(self, batch: TokenBatch) -> TokenBatch:
        return batch

    def signal(self, batch: TokenBatch) -> DenseSignal:
        self.asked += 1
        return self.teacher.signal(batch)

    def settled(self, batches: Iterable[TokenBatch]) -> None:
        return


def states_of(teacher: CachedTeacher, responses: list[Response]) -> Tensor:
    signal = teacher.signal(collate(responses, range(len(responses)), pad_id=0))
    assert isinstance(signal, DenseSignal)
    return signal.hidden_ND


@pytest.fixture
def kept(tmp_path: Path) -> tuple[CachedTeacher, Counting, list[Response]]:
    """A round teacher that has kept what it says of the first eight responses."""
    counting, responses = Counting(), tiny_responses(12)
    teacher = CachedTeacher(teacher=counting, codec=Hidden(), frame=FRAME)  # type: ignore[arg-type]
    teacher.store(tmp_path / "00000.jsonl", responses[:8], None)
    teacher.register(tmp_path / "00000.jsonl")
    return teacher, counting, responses


def test_kept_responses_are_read_in_any_order_and_company(kept) -> None:
    teacher, counting, responses = kept
    judged = counting.asked
    rows = [responses[i] for i in (5, 0, 7, 3)]
    batch = collate(rows, range(4), pad_id=0)
    read = teacher.signal(batch).hidden_ND
    assert counting.asked == judged
    torch.testing.assert_close(read, tiny_teacher().signal(batch).hidden_ND, rtol=1e-4, atol=1e-5)


def test_a_batch_with_a_new_response_is_judged_whole(kept) -> None:
    teacher, counting, responses = kept
    judged = counting.asked
    batch = collate([responses[1], responses[9]], range(2), pad_id=0)
    assert torch.equal(teacher.signal(batch).hidden_ND, tiny_teacher().signal(batch).hidden_ND)
    assert counting.asked == judged + 1


def test_the_same_tokens_split_elsewhere_are_another_response(kept) -> None:
    """One token more of prompt and one less of response: as many ids, another number of states."""
    teacher, counting, responses = kept
    long = max(responses[:8], key=lambda r: len(r.response_ids))
    moved = replace(long, prompt_ids=(*long.prompt_ids, long.response_ids[0]), response_ids=long.response_ids[1:])
    asked = counting.asked
    assert teacher.signal(collate([moved], (0,), pad_id=0)).hidden_ND.shape[0] == len(moved.response_ids)
    assert counting.asked == asked + 1


def test_states_that_came_with_the_sampling_are_kept_as_they_are(tmp_path: Path) -> None:
    counting, (response, *_) = Counting(), tiny_responses(1)
    teacher = CachedTeacher(teacher=counting, codec=Hidden(), frame=FRAME)  # type: ignore[arg-type]
    states = torch.randn(len(response.response_ids), 48)
    teacher.store(tmp_path / "00000.jsonl", [response], [states])
    teacher.register(tmp_path / "00000.jsonl")
    assert torch.equal(states_of(teacher, [response]), states)
    assert counting.asked == 0


def test_what_was_said_of_a_round_goes_when_the_next_begins(tmp_path: Path) -> None:
    counting, responses = Counting(), tiny_responses(6)
    teacher = CachedTeacher(teacher=counting, codec=Hidden(), frame=FRAME)  # type: ignore[arg-type]
    files = [tmp_path / "rounds" / f"{number:03d}" / "student" / "00000.jsonl" for number in (998, 999, 1000)]
    base = tmp_path / "signal" / "00000.jsonl"
    for path, some in zip([base, *files], (responses[:1], responses[1:2], responses[2:4], responses[4:]), strict=True):
        if path != base:
            teacher.start_round(path.parent.parent)
        teacher.store(path, some, None)
        teacher.register(path)
        teacher.signal(collate(some, range(len(some)), pad_id=0))
    assert [path.with_suffix(".safetensors").exists() for path in files] == [False, False, True]
    judged = counting.asked
    for response in (responses[0], *responses[4:]):
        teacher.signal(collate([response], (0,), pad_id=0))
    assert counting.asked == judged
    # A checkpoint from before was taken up, and its round is used once more.
    teacher.register(files[0])
    batch = collate(responses[1:2], (0,), pad_id=0)
    assert torch.equal(states_of(teacher, responses[1:2]), tiny_teacher().signal(batch).hidden_ND)
    assert counting.asked == judged + 1


class Asking(Counting):
    """One that keeps its answers by what it was asked, as a server's."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.answers = torch.device("cpu"), set[str]()

    def fetch_ahead(self, batches: Iterable[TokenBatch], done: Callable[[int], None]) -> None:
        self.answers |= {str(batch.chosen_NS) for batch in batches}

    def settled(self, batches: Iterable[TokenBatch]) -> None:
        self.answers -= {str(batch.chosen_NS) for batch in batches}


def test_answers_about_a_students_choice_go_when_all_is_on_disk(tmp_path: Path) -> None:
    """They are found by what it chose when they were asked for."""
    asking, draw = Asking(), torch.Generator().manual_seed(0)
    choosing = StudentsChoice.of(
        asking,  # type: ignore[arg-type]
        lambda batch: torch.randint(9, (len(batch.labels_N), 2), generator=draw),
        lambda signal, chosen_NS: signal,
    )
    teacher = CachedTeacher(teacher=choosing, codec=Hidden(), frame=FRAME)
    teacher.store(tmp_path / "00000.jsonl", tiny_responses(5), None)
    assert asking.asked and not asking.answers and not choosing._held


def test_a_student_chooses_anew_whenever_a_text_is_scored() -> None:
    """A text is known by its tokens: responses of a preview and of a step have one id. Nothing of a step is kept."""
    weights = 0

    def choose(batch: TokenBatch) -> Tensor:
        return torch.full((len(batch.labels_N), 2), weights)

    choosing = StudentsChoice.of(Asking(), choose, lambda signal, chosen_NS: chosen_NS)  # type: ignore[arg-type, return-value]
    long = max(tiny_responses(5), key=lambda r: len(r.response_ids))
    short = replace(long, response_ids=long.response_ids[:-1])
    for weights, response in enumerate((short, long, short)):
        chosen_NS = choosing.signal(collate([response], [0], pad_id=0))
        assert chosen_NS.tolist() == [[weights] * 2] * len(response.response_ids)  # type: ignore[union-attr]
    assert not choosing._held
