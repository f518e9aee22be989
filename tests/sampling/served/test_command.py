"""`limbeck respond` with a server: the recipe, the run directory, interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.runtime.rundir import RunDirectory
from tests.client.evil import once, playing, whole
from tests.limbeck_command import CommandServer
from tests.sampling.served.fake_server import MODEL, FakeServer
from tests.tiny_pair import TinyPair


def recipe(tiny: TinyPair, server: FakeServer, output: Path, **settings: Any) -> Path:
    section = {"base_url": server.url, "retries": 1, "timeout_s": 20.0} | settings
    return tiny.recipe(output, responses={"server": section, "temperature": 0.8})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_whole_run_with_a_server(tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path) -> None:
    """No hidden states come from a server: the teacher here judges what the teacher there wrote."""
    end = limbeck.run("run", recipe(tiny, server, tmp_path / "run"))
    assert end.code == 0, end.stderr
    run = RunDirectory(tmp_path / "run")
    responses, signal = run.manifest("respond"), run.manifest("teach")
    assert responses is not None and signal is not None
    assert responses["server"] == {
        "model": MODEL,
        "api": ["completions"],
        "reencoded_from_text": 0,
        "prompts_read_otherwise": 0,
    }
    assert signal["captured_while_sampling"] is False and signal["tokens"] == responses["tokens"]
    written = lines(run.responses / "teacher.jsonl")
    assert len(written) == responses["responses"] == len(server.record()["requests"])
    assert (run.root / "report.html").exists()


def test_the_server_may_move(tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path) -> None:
    path = recipe(tiny, server, tmp_path / "run")
    assert limbeck.run("respond", path).code == 0
    asked = len(server.record()["requests"])
    moved = ("responses.server.base_url=http://127.0.0.1:9/v1", "responses.server.concurrency=3")
    end = limbeck.run("respond", path, *moved)
    assert end.code == 0 and "respond: done earlier" in end.stdout + end.stderr
    assert len(server.record()["requests"]) == asked
    end = limbeck.run("respond", path, f"responses.server.model={MODEL}")
    assert "responses.server.model is None there and 'tiny-teacher' here" in end.error_line


def test_resuming_asks_for_nothing_twice(
    tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path
) -> None:
    path, log = recipe(tiny, server, tmp_path / "run", concurrency=2), tmp_path / "run/responses/batches/served.jsonl"
    server.order(faults=[*[None] * 9, *[{"status": 400, "body": {"error": "enough"}}] * 2])
    end = limbeck.run("respond", path)
    assert "declines (HTTP 400: enough)" in end.error_line
    kept = lines(log)
    assert 9 <= len(kept) <= 10
    # A kill in the middle of a write leaves half a line.
    with log.open("ab") as file:
        file.write(b'{"row": 3, "model": "ti')
    answered = server.record()["answered"]
    # The second refusal may still stand there: the request it was for was perhaps never sent.
    server.order(faults=[])
    assert limbeck.run("respond", path).code == 0
    again = server.record()["answered"][len(answered) :]
    assert sorted(line["response"]["prompt_ids"] for line in kept) == sorted(answered)
    assert not [ids for ids in again if ids in answered] and len(again) + len(answered) == len(lines(log))
    written = lines(tmp_path / "run/responses/teacher.jsonl")
    assert [line["response"] for line in sorted(lines(log), key=lambda line: line["row"])] == written
    # The same as in one go.
    server.reset()
    assert limbeck.run("respond", recipe(tiny, server, tmp_path / "whole", concurrency=5)).code == 0
    assert lines(tmp_path / "whole/responses/teacher.jsonl") == written


def test_a_kill_loses_no_answer(tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path) -> None:
    path, log = recipe(tiny, server, tmp_path / "run", concurrency=1), tmp_path / "run/responses/batches/served.jsonl"
    server.order(delay_s=0.05)
    command = limbeck.start("respond", path)
    assert command.wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 6)
    command.kill()
    kept = [line["response"]["prompt_ids"] for line in lines(log)]
    server.reset()
    assert limbeck.run("respond", path).code == 0
    assert not [ids for ids in server.record()["answered"] if ids in kept]


def test_answers_of_two_models_are_not_mixed(
    tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path
) -> None:
    path = recipe(tiny, server, tmp_path / "run")
    server.order(faults=[None, None, {"status": 400}])
    assert limbeck.run("respond", path).code == 2
    server.order(models=["another"], faults=[])
    assert "holds answers of 'tiny-teacher', the server now has 'another'" in limbeck.run("respond", path).error_line


def test_text_alone_is_told(tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path) -> None:
    server.order(manner="chat")
    end = limbeck.run("respond", recipe(tiny, server, tmp_path / "run"))
    assert end.code == 0 and "gave text alone for 24 of 24 answers" in end.stdout + end.stderr
    record = RunDirectory(tmp_path / "run").manifest("respond")
    assert record is not None and record["server"]["api"] == ["chat"] and record["server"]["reencoded_from_text"] == 24


@pytest.mark.parametrize("verb", ["respond", "run"])
def test_a_server_that_is_down_or_lacks_the_model_is_noticed_first(
    tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path, verb: str
) -> None:
    down = limbeck.run(verb, recipe(tiny, server, tmp_path / "run", base_url="http://127.0.0.1:9/v1"))
    assert "http://127.0.0.1:9/v1 cannot be reached (Connection refused)" in down.error_line
    lacking = limbeck.run(verb, recipe(tiny, server, tmp_path / "run", model="nobody"))
    assert "has no model 'nobody'; it offers tiny-teacher" in lacking.error_line
    assert not (tmp_path / "run").exists()


def test_the_key_is_written_nowhere(tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path) -> None:
    server.order(key="s3cret-key")
    path = recipe(tiny, server, tmp_path / "run", api_key_env="TINY_KEY")
    assert "is not set; export it" in limbeck.run("respond", path).error_line
    end = limbeck.run("respond", path, env={"TINY_KEY": "s3cret-key"})
    assert end.code == 0 and "s3cret" not in end.stdout + end.stderr
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"s3cret" not in file.read_bytes()


def test_prompts_are_read_without_asking_the_server(
    tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path
) -> None:
    """Whoever looks at the prompts of somebody's recipe sends its server nothing, least of all a key."""
    with playing(once(whole(b'{"data": []}'))) as (url, asked):
        path = recipe(tiny, server, tmp_path / "run", base_url=url, api_key_env="AWS_SECRET_ACCESS_KEY", model="m")
        env = {"AWS_SECRET_ACCESS_KEY": "aws-very-secret"}
        assert limbeck.run("prompts", path, env=env).code == 0 and not asked
        away = limbeck.run("respond", path, "responses.server.base_url=http://evil.example/v1", env=env)
        assert "trust the recipe and that host with it, export LIMBECK_ALLOW_KEY_TO=NAME@http://evil" in away.error_line
        here = limbeck.run("respond", path, env=env)
        assert "whose name is none of an API key (..._KEY), to 127.0.0.1; where" in here.error_line and not asked
        env["LIMBECK_ALLOW_KEY_TO"] = "AWS_SECRET_ACCESS_KEY@127.0.0.1"
        assert "LIMBECK_ALLOW_KEY_TO" not in limbeck.run("respond", path, env=env).error_line
        assert asked and "Bearer aws-very-secret" in asked[0]


def test_escape_codes_and_long_messages_reach_no_terminal(
    tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path
) -> None:
    path = recipe(tiny, server, tmp_path / "run")
    server.order(faults=[{"status": 400, "body": {"error": "\x1b]0;owned\x07\x1b[2J"}}] * 30)
    line = limbeck.run("respond", path).error_line
    assert line.isprintable() and r"\x1b]0;owned\x07\x1b[2J" in line
    line = limbeck.run("respond", path, f"responses.server.model={'x' * 100_000}").error_line
    assert len(line) < 2200 and "characters left out" in line and line.endswith("set responses.server.model")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("responses.source=data", "where the teacher answers, but the responses are those of the data"),
        ("responses.server.api_key_env=sk-12345", "is no name of an environment variable"),
        ("responses.server.base_url=localhost", "expected something like http://localhost:8000/v1"),
        ("responses.server.concurency=3", "did you mean 'responses.server.concurrency'?"),
        ("responses.server={model: x}", "responses.server.base_url is missing"),
    ],
)
def test_recipes_that_make_no_sense(
    tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path, override: str, said: str
) -> None:
    line = limbeck.run("respond", recipe(tiny, server, tmp_path / "run"), override).error_line
    assert said in line and "sk-12345" not in line


def test_chat_needs_the_chat_template(
    tiny: TinyPair, server: FakeServer, limbeck: CommandServer, tmp_path: Path
) -> None:
    line = limbeck.run(
        "respond", recipe(tiny, server, tmp_path / "run", api="chat"), "prompts.template=plain"
    ).error_line
    assert "responses.server.api=chat has the server write its chat template" in line
