"""A teacher behind vLLM's pooling runner: hidden states in its answers, and what is no state of the teacher."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import limbeck.client.http
from limbeck.models.heads import project
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.served import ServedTeacher
from limbeck.teachers.served_options import OnServer
from limbeck.teachers.served_wire import sizes_behind
from limbeck.types import DenseSignal, LimbeckError
from tests.teachers.scoring_server import ScoringHandler, scoring_server
from tests.teachers.stripped_model import StrippedModel, rows_of

Opened = tuple[ServedTeacher, type[ScoringHandler], list[str]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> StrippedModel:
    return StrippedModel(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def serve(pair: StrippedModel, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    from tokenizers import Tokenizer

    running: list[Any] = []

    def start(**options: Any) -> Opened:
        server = scoring_server(Tokenizer.from_file(str(pair.folder / "tokenizer.json")), pair.scores)
        handler, url, _ = server.__enter__()
        running.append(server)
        handler.pooled = staticmethod(pair.hidden)
        where, lines = OnServer(**{"base_url": url, "retries": 0, "timeout_s": 5.0} | options), list[str]()
        model = TeacherModel(model=str(pair.folder))
        teacher = where.open(model, device=torch.device("cpu"), progress=lines.append)
        teacher.support, teacher.asked = "full", tmp_path / "asked"
        return teacher, handler, lines

    yield start
    for server in running:
        server.__exit__(None, None, None)


def test_its_whole_distribution_is_that_of_the_model(
    serve: Callable[..., Opened], pair: StrippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At float32 of the wire, however long an answer of so many numbers is."""
    monkeypatch.setattr(limbeck.client.http, "MAX_BYTES", 3000)
    batch = rows_of(40)
    teacher, handler, lines = serve()
    assert teacher.provides == {"hidden"}
    teacher.reach()
    # The text is no likelier than by chance to a model with random weights, which is what is said.
    assert re.search(r"in its answers, in float32: .* nats per token .* equal chances give 5\.70: is .*\?$", lines[-1])
    said, own = teacher.signal(batch), pair.local.signal(batch)
    assert isinstance(said, DenseSignal) and said.head.vocab_size == own.head.vocab_size
    torch.testing.assert_close(said.hidden_ND, own.hidden_ND, rtol=1e-5, atol=1e-5)
    p_NV, q_NV = (project(s.head, s.hidden_ND).double().log_softmax(-1) for s in (own, said))
    assert (p_NV.exp() * (p_NV - q_NV)).sum(1).max() < 1e-10
    requests = len(handler.state.requests)
    teacher.signal(batch)
    assert len(handler.state.requests) == requests, "nothing is asked twice"
    teacher.settled([batch])
    assert not list((tmp_path / "asked").iterdir())


def test_a_server_that_computes_in_bfloat16_sends_no_more_than_that(
    serve: Callable[..., Opened], pair: StrippedModel
) -> None:
    teacher, handler, lines = serve()
    handler.pooled = staticmethod(lambda ids: pair.hidden(ids).bfloat16().float())
    teacher.reach()
    assert "in bfloat16" in lines[-1]
    said = teacher.signal(rows_of(12))
    assert isinstance(said, DenseSignal) and said.hidden_ND.dtype == torch.float32
    assert handler.state.requests[-1]["embed_dtype"] == "bfloat16"
    exact = pair.local.signal(rows_of(12)).hidden_ND.bfloat16().float()
    torch.testing.assert_close(said.hidden_ND, exact, rtol=0.02, atol=0.02)
    assert torch.equal(said.hidden_ND.bfloat16().float(), said.hidden_ND)


def coded(states: Any) -> str:
    return base64.b64encode(np.asarray(states, dtype=np.float32).tobytes()).decode()


def _sent(change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    def send(rows: list[Any]) -> list[Any]:
        states = np.frombuffer(base64.b64decode(rows[0]["data"]), dtype=np.float32).reshape(-1, 32)
        return [rows[0] | {"data": coded(change(torch.tensor(states)))}]

    return {"send": send}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"task": "embed"}, ("HTTP 400: Try switching", "token_embed")),
        (_sent(lambda t: t.mean(0)), ("one state for the whole text, which it pools",)),
        (_sent(lambda t: t[:-1]), ("numbers per token", "expected a state of 32 for each of")),
        (_sent(lambda t: t[:, :16]), ("16 numbers per token", "expected a state of 32")),
        (_sent(lambda t: t * torch.nan), ("not finite",)),
        (_sent(lambda t: torch.nn.functional.normalize(t, dim=1)), ("final norm", "it normalises them")),
        (_sent(lambda t: t * 1.01), ("sizes of", "to 1.01", "another model")),
        ({"layer": -1}, ("final norm", "another layer than the last")),
        ({"send": lambda rows: [rows[0] | {"data": "no states!"}]}, ("it answers with",)),
        ({"send": lambda rows: [rows[0] | {"data": [[1.0]]}]}, ("expected data with one text's states in base64",)),
        ({"send": lambda rows: rows * 2}, ("expected data with one text's states in base64",)),
        ({"send": lambda rows: []}, ("expected data with one text's states in base64",)),
    ],
)
def test_what_is_no_state_of_the_teacher_is_refused_before_anything_is_scored(
    serve: Callable[..., Opened], pair: StrippedModel, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    teacher, handler, _ = serve()
    if "layer" in change:
        change = {"pooled": pair.states}
    for name, value in change.items():
        setattr(handler, name, staticmethod(value) if callable(value) else value)
    with pytest.raises(LimbeckError) as error:
        teacher.reach()
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in parts), line
    assert "--runner pooling" in line and "teacher.support=topk_tail" in line


def test_what_goes_wrong_later_ends_in_one_line_and_what_was_answered_is_kept(
    serve: Callable[..., Opened], tmp_path: Path
) -> None:
    teacher, handler, _ = serve(concurrency=1)
    teacher.reach()
    answered = len(handler.state.requests)
    change = _sent(lambda t: t * torch.nan)["send"]
    handler.send = staticmethod(lambda rows: rows if len(handler.state.requests) <= answered + 2 else change(rows))
    with pytest.raises(LimbeckError, match="not finite"):
        teacher.signal(rows_of(12))
    assert len(list((tmp_path / "asked").iterdir())) == 2
    handler.send = staticmethod(lambda rows: rows)
    answered = len(handler.state.requests)
    teacher.signal(rows_of(12))
    assert len(handler.state.requests) == answered + 1


def test_a_text_beyond_the_server_s_window_is_refused_before_any_is_asked_about(
    serve: Callable[..., Opened],
) -> None:
    teacher, handler, _ = serve()
    handler.window = 90
    teacher.reach()
    assert isinstance(teacher.signal(rows_of(91)), DenseSignal)
    before = len(handler.state.requests)
    with pytest.raises(LimbeckError, match=r"reads 90 tokens at most, .* have 91; .*--max-model-len 92"):
        teacher.signal(rows_of(92))
    assert len(handler.state.requests) == before


def test_a_server_of_neither_way_names_both(serve: Callable[..., Opened]) -> None:
    teacher, handler, _ = serve()
    handler.pooled = None
    with pytest.raises(LimbeckError, match=r"--kv-transfer-config, or with --runner pooling"):
        teacher.reach()


@pytest.mark.parametrize("width", [32, 33])
def test_sizes_behind_any_norm_are_1(width: int) -> None:
    torch.manual_seed(0)
    norms = LlamaRMSNorm(width), GemmaRMSNorm(width), torch.nn.LayerNorm(width), torch.nn.LayerNorm(width, bias=False)
    for norm in norms:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter, 0.4, 1.0)
        with torch.no_grad():
            given = norm(torch.randn(64, width) * 7 + 3)
        torch.testing.assert_close(sizes_behind(norm, given), torch.ones(64), rtol=0, atol=1e-4)
        assert (sizes_behind(norm, given * 1.01) - 1).abs().max() > 2e-3
