"""A served teacher that is asked for the tokens that the student finds likeliest, beside its own likeliest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.models.heads import head_of, project
from limbeck.models.loading import load_model
from limbeck.objectives import SparseForm, build_objective, fused_distillation_loss, topk_signal
from limbeck.rollouts.collate import collate
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.chosen import StudentsChoice, likeliest_of
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.served import ServedTeacher
from limbeck.teachers.served_options import OnServer
from limbeck.types import DenseSignal, Head, LimbeckError, Response, TokenBatch, TopKSignal
from tests.teachers.scoring_server import ScoringHandler, scoring_server
from tests.tiny_pair import TinyPair, write_model

MANNERS = ("vllm", "sglang")
K, S = 5, 4
Opened = tuple[ServedTeacher, type[ScoringHandler]]


@pytest.fixture(scope="module")
def local(tiny: TinyPair) -> LocalTeacher:
    loaded = load_model(str(tiny.teacher))
    return LocalTeacher(loaded.model, head_of(loaded.model, len(loaded.tokenizer)))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_model(str(write_model(tmp_path_factory.mktemp("student") / "student", layers=2, seed=7))).model


@pytest.fixture(scope="module")
def batch(local: LocalTeacher, student: torch.nn.Module) -> TokenBatch:
    """Three answers, one with a turn in its middle that is no part of the loss, with the student's choice."""
    ids = torch.randint(3, local.head.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        Response(prompt_id=f"p{i}", author="data", prompt_ids=tuple(row[:4]), response_ids=tuple(row[4:]), stop="eos")
        for i, row in enumerate(ids)
    ]
    rows[1] = replace(rows[1], spans=((0, 3), (5, 20)))
    found = collate(rows, range(3), pad_id=0)
    chosen_NS = likeliest_of(student, found, count=S, vocab_size=local.head.vocab_size)
    return replace(found, chosen_NS=chosen_NS)


@pytest.fixture
def serve(tiny: TinyPair, local: LocalTeacher, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    from tokenizers import Tokenizer

    def scores(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return local.model(torch.tensor([ids])).logits[0, :, : local.head.vocab_size].log_softmax(-1)

    running: list[Any] = []

    def start(k: int = K, s: int = S, manner: str = "vllm", cap: int = 1000, **options: Any) -> Opened:
        server = scoring_server(
            Tokenizer.from_file(str(tiny.teacher / "tokenizer.json")), scores, manner=manner, cap=cap
        )
        handler, url, _ = server.__enter__()
        running.append(server)
        where = OnServer(**{"base_url": url, "retries": 0, "timeout_s": 5.0} | options)
        teacher = where.open(TeacherModel(model=str(tiny.teacher)), device=torch.device("cpu"), progress=None)
        teacher.support_k, teacher.student_k, teacher.asked = k, s, tmp_path / "asked"
        return teacher, handler

    yield start
    for server in running:
        server.__exit__(None, None, None)


def chosen_in(batch: TokenBatch) -> Tensor:
    assert batch.chosen_NS is not None
    return batch.chosen_NS


def log_p(local: LocalTeacher, batch: TokenBatch) -> Tensor:
    return project(local.head, local.signal(batch).hidden_ND).log_softmax(-1)


def test_the_choice_is_that_of_the_whole_logits(student: torch.nn.Module, batch: TokenBatch) -> None:
    logits_BTV = student(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    rows_NV = logits_BTV[batch.loss_mask_BT][:, : int(chosen_in(batch).max()) + 1]
    assert torch.equal(rows_NV.topk(1).indices[:, 0], chosen_in(batch)[:, 0])
    assert chosen_in(batch).shape == (len(batch.labels_N), S)


@pytest.mark.parametrize("manner", MANNERS)
def test_it_says_what_the_model_says_of_the_chosen_tokens_too(
    serve: Callable[..., Opened], local: LocalTeacher, batch: TokenBatch, manner: str
) -> None:
    teacher, _ = serve(manner=manner)
    teacher.reach()
    said, log_p_NV = teacher.signal(batch), log_p(local, batch)
    assert isinstance(said, TopKSignal) and said.ids_NK.shape == (len(batch.labels_N), K + S)
    torch.testing.assert_close(said.logp_NK, log_p_NV.gather(1, said.ids_NK), rtol=0, atol=1e-5)
    exact = topk_signal(log_p_NV, K, chosen_NS=chosen_in(batch))
    for kept, chosen, naive, label in zip(
        said.ids_NK.tolist(), chosen_in(batch).tolist(), exact.ids_NK.tolist(), batch.labels_N.tolist(), strict=True
    ):
        assert len(set(kept)) == K + S and set(chosen) | {label} <= set(kept)
        # Those of a local teacher, but for the token that followed, which takes the place of the least likely one.
        assert kept == naive or (label not in naive and len(set(naive) - set(kept)) == 1)
    assert not set(chosen_in(batch)[0].tolist()) <= set(log_p_NV[0].topk(K + S).indices.tolist()), "it adds something"


def test_texts_without_a_choice_are_asked_as_before(
    serve: Callable[..., Opened], local: LocalTeacher, batch: TokenBatch
) -> None:
    teacher, _ = serve()
    said = teacher.signal(replace(batch, chosen_NS=None))
    assert isinstance(said, TopKSignal) and said.ids_NK.shape[1] == K + S
    torch.testing.assert_close(said.logp_NK, log_p(local, batch).gather(1, said.ids_NK), rtol=0, atol=1e-5)


def test_nothing_is_asked_twice_and_another_choice_is_another_question(
    serve: Callable[..., Opened], batch: TokenBatch
) -> None:
    teacher, handler = serve()
    first = teacher.signal(batch)
    asked = len(handler.state.requests)
    again = teacher.signal(batch)
    assert len(handler.state.requests) == asked
    assert torch.equal(first.ids_NK, again.ids_NK)  # type: ignore[union-attr]
    teacher.signal(replace(batch, chosen_NS=(chosen_in(batch) + 1) % 200))
    assert len(handler.state.requests) == asked + 3


def test_with_all_tokens_the_gradients_are_those_of_the_whole_distribution(
    local: LocalTeacher, batch: TokenBatch
) -> None:
    """K + S = V: to 1e-6 in float64, for every objective of the figure; with fewer the student's choice helps rkl."""
    vocab_size = local.head.vocab_size
    draw = torch.Generator().manual_seed(1)
    head = Head(weight_VD=torch.eye(vocab_size, dtype=torch.float64), vocab_size=vocab_size)
    student_NV, apart_NV = 2 * torch.randn(2, 40, vocab_size, generator=draw, dtype=torch.float64)
    dense = DenseSignal(hidden_ND=student_NV + apart_NV / 2, head=head)
    chosen_NS = student_NV.topk(20).indices

    def gradient(signal: Any, objective: Any, support: Any) -> Tensor:
        leaf_NV = student_NV.clone().requires_grad_()
        fused_distillation_loss(leaf_NV, head, signal, objective, support=support, compile="off").loss.backward()
        assert leaf_NV.grad is not None
        return leaf_NV.grad

    def kept(k: int, own: Tensor | None) -> Any:
        return SparseForm(support="topk_tail", k=k, temperatures=(1.0,)).of(dense, seed=0, chosen_NS=own)

    for options in ({"name": "fkl"}, {"name": "rkl"}, {"name": "js"}, {"name": "skl"}, {"name": "srkl"},
                    {"name": "csd", "first": "teacher", "second": "student"}):  # fmt: skip
        objective = build_objective(**options)
        support = "topk_renorm" if options["name"] == "csd" else "topk_tail"
        whole = gradient(dense, objective, None)
        every = gradient(kept(vocab_size - 20, chosen_NS), objective, support)
        torch.testing.assert_close(every, whole, rtol=1e-6, atol=1e-9)
        if options["name"] in ("rkl", "srkl"):
            errors = [
                (gradient(one, objective, support) - whole).norm() / whole.norm()
                for one in (kept(20, None), kept(10, chosen_NS[:, :10]))
            ]
            assert errors[1] < errors[0], "the same number of tokens"


def test_a_students_choice_is_kept_until_what_was_said_is_on_disk(
    serve: Callable[..., Opened], local: LocalTeacher, batch: TokenBatch, student: torch.nn.Module
) -> None:
    """It reads each response alone, and the answers are forgotten though the student has moved on since."""
    plain, chosen_by = replace(batch, chosen_NS=None), {"count": S, "vocab_size": local.head.vocab_size}
    asked: list[int] = []

    def choose(some: TokenBatch) -> Tensor:
        asked.append(len(some.rows))
        return likeliest_of(student, some, **chosen_by)

    teacher, _ = serve()
    choosing = StudentsChoice.of(teacher, choose, lambda signal, chosen_NS: signal)
    choosing.fetch_ahead([plain], lambda tokens: None)
    said = choosing.signal(plain)
    assert isinstance(said, TopKSignal) and asked == [1, 1, 1], "each response alone, and once"
    torch.testing.assert_close(said.logp_NK, log_p(local, batch).gather(1, said.ids_NK), rtol=0, atol=1e-5)
    assert (said.ids_NK[:, :, None] == chosen_in(batch)[:, None]).any(1).all()
    assert teacher.asked is not None and len(list(teacher.asked.iterdir())) == 3
    choosing.choose = lambda some: torch.zeros(len(some.labels_N), S, dtype=torch.int64)
    choosing.settled([plain])
    assert not list(teacher.asked.iterdir()) and not choosing._held


@pytest.mark.parametrize("wrong", ["missing", "shape", "no array"])
def test_a_wrong_answer_is_refused_in_one_line(serve: Callable[..., Opened], batch: TokenBatch, wrong: str) -> None:
    teacher, handler = serve()
    teacher.reach()
    right = handler.vllm_choice

    def forged(self: Any, body: dict[str, Any]) -> Any:
        status, reply = right(self, body)
        if wrong == "missing":
            del reply["prompt_token_id_logprobs"]
        elif wrong == "no array":
            reply["prompt_token_id_logprobs"] = "eeee"
        else:
            body["sampling_params"]["prompt_logprob_token_ids"] = [
                row[:1] for row in body["sampling_params"]["prompt_logprob_token_ids"]
            ]
            reply = right(self, body)[1]
        return status, reply

    handler.vllm_choice = forged  # type: ignore[method-assign]
    with pytest.raises(LimbeckError, match=r"prompt_token_id_logprobs .*look at the server's log") as caught:
        teacher.signal(batch)
    assert "\n" not in str(caught.value)


def test_servers_that_cannot_be_asked_are_refused_in_one_line(serve: Callable[..., Opened]) -> None:
    teacher, handler = serve()
    handler.scale_out = False
    with pytest.raises(LimbeckError, match=r"cannot be asked for tokens that the student chooses .*enable-scale-out"):
        teacher.reach()
    teacher, _ = serve(manner="llama.cpp")
    with pytest.raises(LimbeckError, match=r"cannot be asked for tokens .*set teacher.student_k=0"):
        teacher.reach()
    teacher, _ = serve(cap=7)
    with pytest.raises(LimbeckError, match=r"at most 7 .*support_k and teacher.student_k are 9 together; lower them"):
        teacher.reach()
