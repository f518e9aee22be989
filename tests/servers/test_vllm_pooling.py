"""A real vLLM that sends hidden states in its answers: the teacher's signal, runs on it, and what is refused of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from limbeck.models.heads import head_of
from limbeck.models.loading import load_model
from limbeck.teachers.local import LocalTeacher
from limbeck.types import DenseSignal, LimbeckError
from tests.servers.conftest import Figures, Vllm, serving
from tests.servers.test_vllm import (
    COMMON,
    SOURCES,
    batch_of,
    log_p,
    losses_of,
    opened,
    prompts,
    require_equal_losses,
    require_local_states,
    texts,
)

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
    said = require_local_states(teacher, batch, expected, figures, "hidden states in answers")
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
    require_equal_losses(found)


def peak_mib(folder: Path, student: Path, teacher: Path, where: str) -> float:
    """Peak memory of the process of a run that scores the data's answers beside the student."""
    overrides = [*COMMON, *SOURCES["kd"], f"student.model={student}", f"teacher.model={teacher}"]
    overrides += [f"output_dir={folder}", f"teacher.where={where}", "teacher.cache=false"]
    overrides += ["evaluate.groups=[fidelity]", f"prompts={{source: {prompts(folder.parent)}, eval_fraction: 0.2}}"]
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "limbeck", "run", "kd", *overrides], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, folder.with_suffix(".log").read_text("utf-8")[-2000:]
    return usage.ru_maxrss / 1024


def test_of_the_teacher_s_weights_no_more_is_in_memory_than_of_one_with_one_block(
    pooling: Vllm, smollm2_dir: Path, student: Path, tmp_path: Path, figures: Figures
) -> None:
    loaded = load_model(str(smollm2_dir))
    model: Any = loaded.model
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "block")
    loaded.tokenizer.save_pretrained(tmp_path / "block")
    served = json.dumps({"name": "server", "base_url": pooling.url, "timeout_s": 600.0})
    peaks = {
        "served": peak_mib(tmp_path / "served", student, smollm2_dir, served),
        "one block here": peak_mib(tmp_path / "one", student, tmp_path / "block", "in_process"),
        "all here": peak_mib(tmp_path / "all", student, smollm2_dir, "in_process"),
    }
    figures.note(
        "`kd` on hidden states in answers: peak memory of the process; with a teacher in it of one block; of all 30",
        ", ".join(f"{mib:.0f} MiB" for mib in peaks.values()),
    )
    assert peaks["served"] <= 1.03 * peaks["one block here"] < peaks["all here"]


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
    (row,) = texts(smollm2_dir, 1, 40)
    with pytest.raises(LimbeckError, match=r"reads 1024 tokens at most"):
        teacher.signal(batch_of([replace(row, response_ids=row.response_ids * 30)]))


def test_a_server_that_pools_a_text_is_refused(vllm_python: str, smollm2_dir: Path, tmp_path: Path) -> None:
    with (
        serving(vllm_python, smollm2_dir, tmp_path, "teacher", *POOLING) as server,
        pytest.raises(LimbeckError, match=r"HTTP 400: Try switching .* token_embed"),
    ):
        opened(server, smollm2_dir, gives="hidden").reach()


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
