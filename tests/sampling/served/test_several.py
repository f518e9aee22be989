"""Several servers of one model, which share the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from limbeck.runtime.rundir import RunDirectory
from limbeck.sampling.served import ServedSampler
from limbeck.types import LimbeckError
from tests.limbeck_command import CommandServer
from tests.sampling.served.asking import SAMPLING, at_both, drawn, prompts_of, served_of
from tests.sampling.served.fake_server import MODEL, FakeServer
from tests.tiny_pair import TinyPair


@pytest.fixture
def second(tiny: TinyPair) -> Iterator[FakeServer]:
    server = FakeServer.start(tiny.teacher)
    yield server
    server.stop()


def test_they_share_the_prompts(sampler: ServedSampler, server: FakeServer, second: FakeServer) -> None:
    """Each prompt is asked once, of either; the answers are those of one server."""
    for one in (server, second):
        one.order(delay_s=0.1)
    prompts = prompts_of(sampler, 24)
    served = served_of(at_both(sampler, server, second), prompts)
    assert [one.response.response_ids for one in served] == [drawn(prompt) for prompt in prompts]
    shares = [one.record() for one in (server, second)]
    assert sorted(ids for share in shares for ids in share["answered"]) == sorted(list(p.ids) for p in prompts)
    assert min(len(share["answered"]) for share in shares) >= 6
    assert all(1 < share["most"] <= sampler.concurrency for share in shares), "as many at a time as one alone"


def test_each_is_asked_as_it_understands(sampler: ServedSampler, server: FakeServer, second: FakeServer) -> None:
    """One takes ids, the other text alone; either finds its way with a prompt that it then need not be asked again."""
    second.order(manner="transformers")
    prompts = prompts_of(sampler, 16)
    served = served_of(at_both(sampler, server, second), prompts)
    assert {one.reencoded for one in served} == {False, True}
    requests = [one.record()["requests"] for one in (server, second)]
    assert {type(request["prompt"]) for request in requests[0]} == {list}
    assert len(requests[0]) + len([r for r in requests[1] if isinstance(r["prompt"], str)]) >= len(prompts)


def test_one_that_goes_down_costs_nothing(sampler: ServedSampler, server: FakeServer, mortal: FakeServer) -> None:
    said: list[str] = []
    prompts = prompts_of(sampler, 24)
    for one in (server, mortal):
        one.order(delay_s=0.05)
    found: dict[int, tuple[int, ...]] = {}
    for served in at_both(sampler, mortal, server, said=said).respond_as_they_come(prompts, SAMPLING):
        assert served.index not in found
        found[served.index] = served.response.response_ids
        if len(found) == 6:
            mortal.stop()
    assert [found[place] for place in range(24)] == [drawn(prompt) for prompt in prompts]
    (line,) = said
    assert mortal.url in line and line.endswith("the others of responses.server.base_url (1) do its work")


def test_one_that_was_left_out_is_asked_again_the_next_time(
    sampler: ServedSampler, server: FakeServer, second: FakeServer
) -> None:
    said: list[str] = []
    both, prompts = at_both(sampler, second, server, said=said), prompts_of(sampler, 12)
    second.order(faults=[{"status": 200, "body": {"choices": []}}])
    served_of(both, prompts)
    assert len(said) == 1 and not second.record()["answered"]
    served_of(both, prompts)
    assert second.record()["answered"]


def test_the_last_one_says_why(sampler: ServedSampler, server: FakeServer, second: FakeServer) -> None:
    for one in (server, second):
        one.order(models=["another"])
    with pytest.raises(LimbeckError, match="declines to answer prompt p0") as caught:
        served_of(at_both(sampler, server, second), prompts_of(sampler, 12))
    assert "\n" not in str(caught.value)
    # The first prompt goes alone: no other was sent.
    assert {tuple(r["prompt"]) for r in second.record()["requests"] if isinstance(r["prompt"], list)} <= {
        prompts_of(sampler, 1)[0].ids
    }


def respond(limbeck: CommandServer, tiny: TinyPair, out: Path, addresses: list[str], *more: str):
    section = {"base_url": addresses, "retries": 0, "timeout_s": 20.0}
    return limbeck.run("respond", tiny.recipe(out, responses={"server": section, "temperature": 0.8}), *more)


def test_a_run_with_two(
    tiny: TinyPair, server: FakeServer, second: FakeServer, limbeck: CommandServer, tmp_path: Path
) -> None:
    """The bytes of one server; a third that is down is told and does not count."""
    end = respond(limbeck, tiny, tmp_path / "two", [server.url, second.url, "http://127.0.0.1:9/v1"])
    assert end.code == 0, end.stderr
    assert "http://127.0.0.1:9/v1 cannot be reached" in end.stderr + end.stdout
    assert server.record()["answered"] and second.record()["answered"]
    assert respond(limbeck, tiny, tmp_path / "one", [server.url]).code == 0
    runs = [RunDirectory(tmp_path / name) for name in ("one", "two")]
    assert len({(run.responses / "teacher.jsonl").read_bytes() for run in runs}) == 1
    manifest = runs[1].manifest("respond")
    assert manifest is not None and manifest["server"]["model"] == MODEL
    # Addresses do not count: another number of them goes on with what is there.
    end = respond(limbeck, tiny, tmp_path / "two", [server.url])
    assert end.code == 0 and "respond: done earlier" in end.stdout + end.stderr


def test_wrong_addresses_and_unlike_models(
    tiny: TinyPair, server: FakeServer, second: FakeServer, limbeck: CommandServer, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for addresses, said in (
        ([], "responses.server.base_url is empty; give the address of a server that serves the teacher"),
        ([server.url, server.url], "responses.server.base_url names a server twice; name each once"),
        (["http://127.0.0.1:9/v1", "http://127.0.0.1:10/v1"], "cannot be reached"),
    ):
        end = respond(limbeck, tiny, out, addresses)
        assert end.code == 2 and said in end.error_line
    second.order(models=["another"])
    end = respond(limbeck, tiny, out, [server.url, second.url])
    assert end.code == 2 and f"has {MODEL!r}, " in end.error_line and "has 'another'" in end.error_line
    # One that lacks the model that is named is a mistake, not a server that is down.
    end = respond(limbeck, tiny, out, [server.url, second.url], f"responses.server.model={json.dumps(MODEL)}")
    assert end.code == 2 and f"has no model {MODEL!r}; it offers another" in end.error_line
