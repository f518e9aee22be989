"""A teacher behind a server: what it says is what the model says, asked once, and lies are refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.heads import head_of, project
from limbeck.models.loading import load_model
from limbeck.objectives import OBJECTIVES, Temperature, build_objective, fused_distillation_loss, topk_signal
from limbeck.objectives.base import Objective
from limbeck.pipeline.signal_statement import NEVER_LARGER
from limbeck.rollouts.collate import collate
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.served import ServedTeacher
from limbeck.teachers.served_options import OnServer
from limbeck.teachers.served_texts import texts_of
from limbeck.types import DenseSignal, Head, LimbeckError, Response, TokenBatch, TopKSignal
from tests.teachers.scoring_server import ScoringHandler, scoring_server
from tests.tiny_pair import TinyPair, write_tokenizer

MANNERS = ("vllm", "sglang", "llama.cpp")


@pytest.fixture(scope="module")
def local(tiny: TinyPair) -> LocalTeacher:
    loaded = load_model(str(tiny.teacher))
    return LocalTeacher(loaded.model, head_of(loaded.model, len(loaded.tokenizer)))


@pytest.fixture(scope="module")
def batch(local: LocalTeacher) -> TokenBatch:
    """Three answers, of which one has a turn in its middle that is no part of the loss."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, local.head.vocab_size, (3, 12), generator=draw).tolist()
    rows = [
        Response(prompt_id=f"p{i}", author="data", prompt_ids=tuple(row[:4]), response_ids=tuple(row[4:]), stop="eos")
        for i, row in enumerate(ids)
    ]
    rows[1] = replace(rows[1], spans=((0, 3), (5, 8)))
    return collate(rows, range(3), pad_id=0)


Opened = tuple[ServedTeacher, type[ScoringHandler]]


@pytest.fixture
def serve(tiny: TinyPair, local: LocalTeacher, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    from tokenizers import Tokenizer

    def scores(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits_TV = local.model(torch.tensor([ids])).logits[0, :, : local.head.vocab_size]
        return logits_TV.log_softmax(-1)

    running: list[Any] = []

    def start(
        k: int = 8, manner: str = "vllm", cap: int = 1000, tokenizer: Path | None = None, **options: Any
    ) -> Opened:
        read = Tokenizer.from_file(str((tokenizer or tiny.teacher) / "tokenizer.json"))
        server = scoring_server(read, scores, manner=manner, cap=cap)
        handler, url, _ = server.__enter__()
        running.append(server)
        where = OnServer(**{"base_url": url, "retries": 0, "timeout_s": 5.0} | options)
        teacher = where.open(TeacherModel(model=str(tiny.teacher)), device=torch.device("cpu"), progress=None)
        teacher.support_k, teacher.asked = k, tmp_path / "asked"
        return teacher, handler

    yield start
    for server in running:
        server.__exit__(None, None, None)


def said_by(teacher: ServedTeacher, batch: TokenBatch) -> TopKSignal:
    signal = teacher.signal(batch)
    assert isinstance(signal, TopKSignal)
    return signal


@pytest.mark.parametrize("manner", MANNERS)
def test_it_says_what_the_model_says(
    serve: Callable[..., Opened], local: LocalTeacher, batch: TokenBatch, manner: str
) -> None:
    """The likeliest tokens in order, and the one that followed in the last place where it is not among them."""
    teacher, _ = serve(manner=manner)
    teacher.reach()
    said = said_by(teacher, batch)
    log_p_NV = project(local.head, local.signal(batch).hidden_ND).log_softmax(-1)
    torch.testing.assert_close(said.logp_NK, log_p_NV.gather(1, said.ids_NK), rtol=0, atol=1e-5)
    best_NK = log_p_NV.topk(8).indices
    absent_N = (best_NK != batch.labels_N[:, None]).all(1)
    assert absent_N.any() and torch.equal(said.ids_NK[~absent_N], best_NK[~absent_N])
    assert torch.equal(said.ids_NK[:, :7], best_NK[:, :7])
    last_N = best_NK[:, 7] if manner == "llama.cpp" else torch.where(absent_N, batch.labels_N, best_NK[:, 7])
    assert torch.equal(said.ids_NK[:, 7], last_N)


@pytest.mark.parametrize("manner", MANNERS)
def test_with_all_tokens_every_objective_has_the_gradient_of_the_local_teacher(
    serve: Callable[..., Opened], local: LocalTeacher, batch: TokenBatch, manner: str
) -> None:
    """To the float32 of the wire, and at temperatures other than 1 too: nothing is outside of what is said."""
    teacher, _ = serve(k=local.head.vocab_size, manner=manner)
    said = said_by(teacher, batch)
    if manner != "vllm":
        torch.testing.assert_close(said.logp_NK.exp().sum(1), torch.ones(len(said.ids_NK)), rtol=0, atol=1e-5)
        return
    student = Head(weight_VD=torch.randn(local.head.vocab_size, 16), vocab_size=local.head.vocab_size)
    measured = []
    for name in OBJECTIVES:
        one = build_objective(name)
        if isinstance(one, Objective) and {"full", "topk_tail"} <= one.supports:
            for tau in (1.0,) if one.caution else (1.0, 2.0):
                grads = [
                    gradient(student, signal, one, batch, tau)
                    for signal in (local.signal(batch), replace(said, temperatures=(tau,)))
                ]
                torch.testing.assert_close(grads[1], grads[0], rtol=2e-4, atol=2e-6, msg=f"{name} at {tau}")
                measured.append(name)
    assert {"fkl", "rkl", "js", "skl", "srkl", "tv", "ab", "ce"} <= set(measured)


def gradient(head: Head, signal: Any, objective: Any, batch: TokenBatch, tau: float) -> torch.Tensor:
    hidden_ND = torch.randn(len(batch.labels_N), 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = fused_distillation_loss(
        hidden_ND,
        head,
        signal,
        objective,
        temperature=Temperature(loss=tau),
        label_N=batch.labels_N,
        sequence_N=batch.sequence_N,
        compile="off",
    )
    out.loss.backward()
    assert hidden_ND.grad is not None
    return hidden_ND.grad


def test_nothing_is_asked_twice_and_answers_outlive_the_process(
    serve: Callable[..., Opened], batch: TokenBatch
) -> None:
    teacher, handler = serve()
    first = said_by(teacher, batch)
    asked = len(scorings(handler))
    again = said_by(reopened(teacher), batch)
    assert len(scorings(handler)) == asked and torch.equal(first.logp_NK, again.logp_NK)
    teacher.settled()
    said_by(reopened(teacher), batch)
    assert len(scorings(handler)) > asked


def test_ahead_of_the_batches_several_are_under_way(serve: Callable[..., Opened], batch: TokenBatch) -> None:
    teacher, handler = serve(concurrency=3)
    teacher.reach()
    handler.state.delay_s, done = 0.1, []
    teacher.fetch_ahead([batch], done.append)
    assert handler.state.most == 3 and sum(done) == len(batch.labels_N)
    before = len(handler.state.requests)
    said_by(teacher, batch)
    assert len(handler.state.requests) == before


def scorings(handler: type[ScoringHandler]) -> list[Any]:
    return [body for body in handler.state.requests if "prompt_logprobs" in body and len(body["prompt"]) > 4]


def reopened(teacher: ServedTeacher) -> ServedTeacher:
    other = teacher.where.open(teacher.model, device=teacher.device, progress=None)
    other.asked, other.support_k = teacher.asked, teacher.support_k
    return other


def test_of_two_servers_the_one_that_dies_costs_its_requests(serve: Callable[..., Opened], batch: TokenBatch) -> None:
    one, _ = serve()
    two, dying = serve()
    lines: list[str] = []
    both = replace(one.where, base_url=(two.where.base_url, one.where.base_url))
    teacher = both.open(one.model, device=one.device, progress=lines.append)
    teacher.support_k = 8
    teacher.reach()
    dying.state.faults = ["hang up"] * 50
    said = said_by(teacher, batch)
    assert torch.equal(said.ids_NK, said_by(one, batch).ids_NK)
    assert len(lines) == 1 and "cut the connection off" in lines[0]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda rows: rows[:-9], ("prompt_logprobs of",)),
        (lambda rows: [*rows[:-1], None], ("null",)),
        (lambda rows: [*rows[:-1], {"5": {"logprob": float("nan")}} | rows[-1]], ("nan",)),
        (lambda rows: [*rows[:-1], rows[-1] | {"5": {"logprob": 3.5}}], ("3.5", "at most 0")),
        (lambda rows: [*rows[:-1], rows[-1] | {"99999": {"logprob": -1.0}}], ("token id 99999",)),
        (lambda rows: [*rows[:-1], {token: {"logprob": -0.1} for token in rows[-1]}], ("add up to",)),
        (lambda rows: [*rows[:-1], dict(list(rows[-1].items())[1:])], ("which followed",)),
    ],
)
def test_a_wrong_answer_is_refused_in_one_line(
    serve: Callable[..., Opened], batch: TokenBatch, change: Any, parts: tuple[str, ...]
) -> None:
    teacher, handler = serve()
    teacher.reach()
    handler.lie = staticmethod(change)
    with pytest.raises(LimbeckError) as error:
        teacher.signal(batch)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


def test_what_the_server_cannot_do_is_found_before_it_is_needed(serve: Callable[..., Opened], tmp_path: Path) -> None:
    teacher, handler = serve(k=64, cap=20)
    with pytest.raises(LimbeckError, match=r"at most 20 log-probabilities .* set teacher.support_k=20"):
        teacher.reach()
    write_tokenizer(tmp_path / "other", extra=["The quick brown fox jumps over the lazy dog"] * 50)
    with pytest.raises(LimbeckError, match=r"another tokenizer than teacher.model"):
        serve(tokenizer=tmp_path / "other")[0].reach()
    handler.cap = 1000
    with pytest.raises(LimbeckError, match=r"no log-probabilities of given tokens .*sglang"):
        replace_where(teacher, api="sglang").reach()
    with pytest.raises(LimbeckError, match=r"has no model 'other'; it offers tiny-teacher: set teacher.where.model"):
        replace_where(teacher, model="other").reach()
    with pytest.raises(LimbeckError, match="cannot be reached"):
        replace_where(teacher, base_url="http://127.0.0.1:9").reach()


def replace_where(teacher: ServedTeacher, **options: Any) -> ServedTeacher:
    other = replace(teacher.where, **options)
    opened = other.open(teacher.model, device=teacher.device, progress=None)
    opened.support_k = teacher.support_k
    return opened


def test_another_model_does_not_go_on_with_answers_of_the_first(
    serve: Callable[..., Opened], batch: TokenBatch
) -> None:
    teacher, handler = serve()
    said_by(teacher, batch)
    handler.state.models = ["another"]
    with pytest.raises(LimbeckError, match=r"holds answers of 'tiny-teacher', and the server has 'another'"):
        reopened(teacher).reach()


def test_texts_end_with_the_last_token_that_counts(batch: TokenBatch) -> None:
    texts = [text for text in texts_of(batch) if text is not None]
    assert sum((text.labels for text in texts), ()) == tuple(batch.labels_N.tolist())
    assert all(text.positions[-1] == len(text.ids) - 1 for text in texts)


def test_what_is_called_bounded_is_never_larger_than_the_whole() -> None:
    draw = torch.Generator().manual_seed(3)
    hidden_ND, teacher_NV = torch.randn(200, 12, generator=draw), 2 * torch.randn(200, 40, generator=draw)
    head = Head(weight_VD=torch.randn(40, 12, generator=draw), vocab_size=40)
    whole = DenseSignal(hidden_ND=teacher_NV, head=Head(weight_VD=torch.eye(40), vocab_size=40))
    part = topk_signal(teacher_NV, 6)
    assert set(OBJECTIVES) >= NEVER_LARGER
    for name in NEVER_LARGER:
        value_N, bound_N = (
            fused_distillation_loss(
                hidden_ND,
                head,
                signal,
                build_objective(name),
                label_N=torch.zeros(200, dtype=torch.int64),
                compile="off",
            ).value_N
            for signal in (part, whole)
        )
        assert (value_N <= bound_N + 1e-5).all() and (value_N < bound_N - 1e-3).any(), name
