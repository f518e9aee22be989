"""`transformers serve` with the tiny teacher: a real server, and one that gives text alone."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.models.loading import load_tokenizer
from limbeck.rollouts.io import read_responses
from limbeck.runtime.rundir import RunDirectory
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}: see extra dev")
START_S = 120.0
HALF = "\ufffd"


@pytest.fixture(scope="module")
def url(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-c", "from transformers.cli.transformers import main; main()", "serve", str(tiny.teacher)]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent)},
        )
    deadline = time.monotonic() + START_S
    while not answers(f"http://127.0.0.1:{port}/health"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()
    process.wait(10)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as reply:
            return reply.status == 200
    except OSError:
        return False


def respond(limbeck: CommandServer, path: Path) -> Any:
    end = limbeck.run("respond", path)
    assert end.code == 0, end.stderr
    return end


@pytest.mark.parametrize(("api", "template"), [("auto", "auto"), ("chat", "auto"), ("auto", "plain")])
def test_greedy_answers_are_those_of_the_teacher_here(
    tiny: TinyPair, url: str, limbeck: CommandServer, tmp_path: Path, api: str, template: str
) -> None:
    """The same weights here and there, so the same words; only their ids have to be found again."""
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 10}
    prompts = {"template": template}
    server = {"base_url": url, "model": str(tiny.teacher), "api": api, "timeout_s": 60.0}
    end = respond(limbeck, tiny.recipe(tmp_path / "there", responses=settings | {"server": server}, prompts=prompts))
    respond(limbeck, tiny.recipe(tmp_path / "here", responses=settings, prompts=prompts))
    there, here = (read_responses(tmp_path / name / "responses/teacher.jsonl") for name in ("there", "here"))
    assert [r.prompt_ids for r in there] == [r.prompt_ids for r in here]
    decode: Any = load_tokenizer(str(tiny.teacher)).decode
    said = [[decode(r.response_ids, skip_special_tokens=True).rstrip(HALF) for r in x] for x in (there, here)]
    # This teacher writes half characters, which text does not carry: they come back as others, and as more of them.
    assert all(y.startswith(x) and (HALF in y or x == y) for x, y in zip(*said, strict=True))
    assert any(x and x == y for x, y in zip(*said, strict=True)) and len(set(said[0])) > 6
    record = RunDirectory(tmp_path / "there").manifest("respond")
    assert record is not None and record["server"] == {
        "model": str(tiny.teacher),
        "api": ["chat" if api == "chat" else "completions"],
        "reencoded_from_text": len(there),
        "prompts_read_otherwise": 0,
    }
    assert "gave text alone for 24 of 24 answers" in end.stderr


def test_sampled_answers_differ_from_greedy_ones(
    tiny: TinyPair, url: str, limbeck: CommandServer, tmp_path: Path
) -> None:
    """`transformers serve` is greedy at any temperature where the model's own configuration is, unless told."""
    written = []
    for number, temperature in enumerate((0.0, 1.0, 1.0)):
        server = {"base_url": url, "model": str(tiny.teacher), "concurrency": 1, "timeout_s": 60.0}
        responses = {"temperature": temperature, "seed": 7, "server": server}
        respond(limbeck, tiny.recipe(tmp_path / str(number), responses=responses))
        written.append([r.response_ids for r in read_responses(tmp_path / f"{number}/responses/teacher.jsonl")])
    assert sum(a != b for a, b in zip(written[0], written[1], strict=True)) > 12
    assert written[1] == written[2], "one at a time, it keeps to the seeds"


def test_a_model_it_does_not_serve(tiny: TinyPair, url: str, limbeck: CommandServer, tmp_path: Path) -> None:
    server = {"base_url": url, "model": "/nowhere", "retries": 0}
    line = limbeck.run("respond", tiny.recipe(tmp_path / "run", responses={"server": server})).error_line
    assert "Server is pinned to" in line and "set responses.server.api" in line
