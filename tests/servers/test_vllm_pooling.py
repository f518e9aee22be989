"""A real vLLM that sends hidden states in its answers: the teacher's signal, runs on it, and what is refused of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from limbeck.models.heads import head_of
from limbeck.models.loading import load_model
from limbeck.teachers.local import LocalTeacher
from limbeck.types import DenseSignal, LimbeckError
from tests.servers.conftest import Figures, Vllm, serving
from tests.servers.test_vllm import batch_of, log_p, losses_of, opened, texts

POOLING = ("--runner", "pooling", "--convert", "embed")
EVERY_TOKEN = ("--pooler-config", '{"task": "token_embed"}')
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def pooling(vllm_python: str, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    with serving(
        vllm_python, smollm2_dir, tmp_path_factory.mktemp("pooling"), "teacher", *POOLING, *EVERY_TOKEN
    ) as server:
        yield server


def test_states_in_answers_are_those_of_the_model_here(pooling: Vllm, smollm2_dir: Path, figures: Figures) -> None:
    """Asked twice, with texts behind whose prompts others go on."""
    loaded = load_model(str(smollm2_dir))
    batch = batch_of(texts(smollm2_dir, 4, 40))
    expected = log_p(LocalTeacher(loaded.model, head_of(loaded.model, len(loaded.tokenizer))).signal(batch))
    teacher = opened(pooling, smollm2_dir, gives="hidden")
    teacher.reach()
    for again in ("", ", asked again"):
        said = teacher.signal(batch)
        assert isinstance(said, DenseSignal)
        kl_N = (expected.exp() * (expected - log_p(said))).sum(1)
        figures.note(
            f"hidden states in answers: KL to the local signal over {len(kl_N)} tokens{again}",
            f"mean {kl_N.mean():.1e}, largest {kl_N.max():.1e} nats",
        )
        assert kl_N.mean() <= 1e-6
    ids = batch.input_ids_BT[0].tolist()
    body = {"model": "teacher", "input": ids, "task": "token_embed", "use_activation": False}
    sizes = [
        len(pooling.post("/pooling", body | {"encoding_format": "base64", "embed_dtype": kind})) / len(ids)
        for kind in ("float32", "bfloat16")
    ]
    figures.note(
        f"hidden states in answers: bytes per token of a text, {said.hidden_ND.shape[1]} numbers each",
        f"{sizes[0]:.0f} of a server in float32, {sizes[1]:.0f} of one in bfloat16",
    )
    assert sizes[1] < 0.52 * sizes[0]


@pytest.mark.parametrize("recipe", ["kd", "gkd"])
def test_losses_are_those_of_a_teacher_in_this_process(
    pooling: Vllm,
    smollm2_dir: Path,
    student: Path,
    tmp_path: Path,
    figures: Figures,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    found = losses_of(pooling.url, smollm2_dir, student, tmp_path, monkeypatch, recipe)
    found.note(figures, f"`{recipe}` on hidden states in answers")
    assert found.steps == 3 and found.apart <= 1e-4
    assert found.loads["served"] == 0 < found.loads["local"]


def test_a_model_with_another_norm_is_refused(pooling: Vllm, student: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in student.iterdir():
        if path.suffix != ".safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    with safe_open(student / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = stored[NORM] * torch.linspace(0.98, 1.03, len(stored[NORM]))
    save_file(stored | {NORM: changed}, other / "model.safetensors", metadata={"format": "pt"})
    opened(pooling, student, gives="hidden").reach()
    with pytest.raises(LimbeckError, match=r"final norm its states have sizes .* another model"):
        opened(pooling, other, gives="hidden").reach()


def test_a_text_beyond_its_window_is_refused_before_it_is_asked_about(pooling: Vllm, smollm2_dir: Path) -> None:
    teacher = opened(pooling, smollm2_dir, gives="hidden")
    teacher.reach()
    with pytest.raises(LimbeckError, match=r"reads 1024 tokens at most"):
        teacher.signal(batch_of(texts(smollm2_dir, 1, 1100)))


def test_a_server_that_pools_a_text_is_refused(
    vllm_python: str, smollm2_dir: Path, tmp_path: Path, figures: Figures
) -> None:
    with (
        serving(vllm_python, smollm2_dir, tmp_path, "teacher", *POOLING) as server,
        pytest.raises(LimbeckError, match=r"HTTP 400: Try switching .* token_embed") as error,
    ):
        opened(server, smollm2_dir, gives="hidden").reach()
    figures.note("a server that pools the states of a text", f"refused: {str(error.value).partition('; ')[2]}")


def test_a_server_in_bfloat16_sends_that(vllm_python: str, smollm2_dir: Path, tmp_path: Path, figures: Figures) -> None:
    loaded = load_model(str(smollm2_dir))
    batch = batch_of(texts(smollm2_dir, 4, 40))
    expected = log_p(LocalTeacher(loaded.model, head_of(loaded.model, len(loaded.tokenizer))).signal(batch))
    lines: list[str] = []
    with serving(vllm_python, smollm2_dir, tmp_path, "teacher", *POOLING, *EVERY_TOKEN, dtype="bfloat16") as server:
        teacher = opened(server, smollm2_dir, gives="hidden")
        teacher.progress = lines.append
        teacher.reach()
        said = teacher.signal(batch)
    assert isinstance(said, DenseSignal) and "in bfloat16" in lines[-1]
    kl_N = (expected.exp() * (expected - log_p(said))).sum(1)
    figures.note(
        f"hidden states in answers of a server in bfloat16: KL to the local float32 signal over {len(kl_N)} tokens",
        f"mean {kl_N.mean():.1e}, largest {kl_N.max():.1e} nats",
    )
    assert kl_N.mean() <= 0.01
