"""A teacher behind a server that writes hidden states: its whole distribution, and what no server may do to a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from limbeck.models.heads import project
from limbeck.models.skeleton import final_norm
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.served import ServedTeacher
from limbeck.teachers.served_options import OnServer
from limbeck.types import DenseSignal, LimbeckError, TokenBatch
from tests.teachers.scoring_server import ScoringHandler, scoring_server
from tests.teachers.stripped_model import TIED_HEAD, StrippedModel, rows_of
from tests.tiny_pair import write_model

Opened = tuple[ServedTeacher, type[ScoringHandler]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> StrippedModel:
    return StrippedModel(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return rows_of(12)


@pytest.fixture
def serve(pair: StrippedModel, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    from tokenizers import Tokenizer

    (tmp_path / "states").mkdir()
    running: list[Any] = []

    def start(**options: Any) -> Opened:
        server = scoring_server(Tokenizer.from_file(str(pair.folder / "tokenizer.json")), pair.scores)
        handler, url, _ = server.__enter__()
        running.append(server)
        handler.states, handler.folder = staticmethod(pair.states), tmp_path / "states"
        where = OnServer(**{"base_url": url, "retries": 0, "timeout_s": 5.0} | options)
        teacher = where.open(TeacherModel(model=str(pair.folder)), device=torch.device("cpu"), progress=None)
        teacher.support, teacher.asked = "full", tmp_path / "asked"
        return teacher, handler

    yield start
    for server in running:
        server.__exit__(None, None, None)


def test_its_whole_distribution_is_that_of_the_model(
    serve: Callable[..., Opened], pair: StrippedModel, batch: TokenBatch, tmp_path: Path
) -> None:
    """At float32 of the wire, with nothing of the model here but its last norm and its head."""
    teacher, handler = serve()
    assert teacher.provides == {"hidden"}
    teacher.reach()
    said, own = teacher.signal(batch), pair.local.signal(batch)
    assert isinstance(said, DenseSignal) and said.head.vocab_size == own.head.vocab_size
    torch.testing.assert_close(said.hidden_ND, own.hidden_ND, rtol=1e-5, atol=1e-5)
    p_NV, q_NV = (project(s.head, s.hidden_ND).double().log_softmax(-1) for s in (own, said))
    assert (p_NV.exp() * (p_NV - q_NV)).sum(1).max() < 1e-10
    assert not list((tmp_path / "states").iterdir()), "files of the server are deleted once read"
    requests = len(handler.state.requests)
    teacher.signal(batch)
    assert len(handler.state.requests) == requests
    teacher.settled([batch])
    assert not list((tmp_path / "asked").iterdir())


def test_another_place_of_the_folder_can_be_named(
    serve: Callable[..., Opened], batch: TokenBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, handler = serve(folder=str(tmp_path / "states"))
    write = ScoringHandler.write_states
    monkeypatch.setattr(handler, "write_states", lambda self, ids: Path("/of/the/server") / write(self, ids).name)
    assert isinstance(teacher.signal(batch), DenseSignal)
    other, handler = serve()
    monkeypatch.setattr(handler, "write_states", lambda self, ids: Path("/of/the/server") / write(self, ids).name)
    with pytest.raises(LimbeckError, match=r"not on this machine .*teacher.where.folder"):
        other.reach()


def _of(**tensors: Any) -> Any:
    return lambda given: given | {name: change(given[name]) for name, change in tensors.items()}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"states": None}, ("kv_transfer_params null", "--kv-transfer-config", "teacher.support=topk_tail")),
        ({"layer": 0}, ("nats from its own", "another layer than the last", "docs/serving.md")),
        ({"forge": _of(hidden_states=lambda t: t[..., :8].clone())}, ("width 8", "has 32")),
        ({"forge": _of(token_ids=lambda t: t + 1)}, ("other tokens than the",)),
        ({"forge": _of(hidden_states=lambda t: t * torch.nan)}, ("not finite",)),
        ({"forge": _of(hidden_states=lambda t: t[:, 0].clone())}, ("expected hidden_states (tokens, layers, width)",)),
        ({"forge": lambda given: None}, ("not on this machine", "shared_storage_path")),
        ({"late_s": 0.8}, ("not whole after 0.2 s",)),
    ],
)
def test_a_server_that_gives_none_or_wrong_ones_is_refused_before_anything_is_scored(
    serve: Callable[..., Opened], pair: StrippedModel, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    teacher, handler = serve(timeout_s=0.2 if "late_s" in change else 5.0)
    if "layer" in change:
        layer = change["layer"]
        change = {"states": staticmethod(lambda ids: pair.states(ids, layer))}
    for name, value in change.items():
        setattr(handler, name, staticmethod(value) if name == "forge" else value)
    with pytest.raises(LimbeckError) as error:
        teacher.reach()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


def test_a_file_that_is_not_of_the_texts_states_stays(
    serve: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server names any path: what is not what was asked for is not deleted."""
    mine = tmp_path / "mine.safetensors"
    save_file({"hidden_states": torch.zeros(4, 1, 32), "token_ids": torch.arange(4)}, mine)
    teacher, handler = serve()
    monkeypatch.setattr(handler, "write_states", lambda self, ids: mine)
    with pytest.raises(LimbeckError, match="other tokens"):
        teacher.reach()
    mine.with_name("text.txt").write_text("a text")
    monkeypatch.setattr(handler, "write_states", lambda self, ids: mine.with_name("text.txt"))
    with pytest.raises(LimbeckError, match="cannot be read"):
        teacher.reach()
    assert mine.exists() and mine.with_name("text.txt").exists()


def test_a_folder_without_the_two_weights_says_which_it_lacks(
    serve: Callable[..., Opened], pair: StrippedModel, tmp_path: Path
) -> None:
    teacher, _ = serve()
    bare = write_model(tmp_path / "bare", head_rows=320)
    with safe_open(bare / "model.safetensors", framework="pt") as file:
        head = file.get_tensor(TIED_HEAD)
    (bare / "model.safetensors").unlink()
    other = teacher.where.open(TeacherModel(model=str(bare)), device=teacher.device, progress=None)
    other.support = "full"
    with pytest.raises(LimbeckError, match="no stored head"):
        other.reach()
    save_file({TIED_HEAD: head}, bare / "model.safetensors")
    again = teacher.where.open(TeacherModel(model=str(bare)), device=teacher.device, progress=None)
    again.support = "full"
    with pytest.raises(LimbeckError, match=r"no stored final norm \(weight\)"):
        again.reach()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("GPT2", "ln_f"),
        ("GPTNeoX", "final_layer_norm"),
        ("Gemma2", "norm"),
        ("Qwen3", "norm"),
        ("Bloom", "ln_f"),
        ("OPT", "final_layer_norm"),
    ],
)
def test_the_last_norm_is_found(family: str, name: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")()
    for size in ("num_hidden_layers", "n_layer"):
        if hasattr(config, size):
            setattr(config, size, 2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = [full for full, module in model.named_modules() if module is final_norm(model)]
    assert re.search(rf"(^|\.){name}$", names[0]) and names[0].count(".") <= 2
