"""The served sampler and a server that behaves."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from limbeck.sampling.decoding import row_seed
from limbeck.sampling.served import ServedSampler
from limbeck.types import LimbeckError, Sampler
from tests.sampling.served.asking import SAMPLING, drawn, prompts_of, served_of
from tests.sampling.served.fake_server import END, FakeServer


def test_ids_are_those_that_were_drawn(sampler: ServedSampler, server: FakeServer) -> None:
    prompts = prompts_of(sampler)
    assert isinstance(sampler, Sampler)
    responses = sampler.respond(prompts, SAMPLING)
    assert [r.response_ids for r in responses] == [drawn(p) for p in prompts]
    assert [r.prompt_ids for r in responses] == [p.ids for p in prompts]
    assert {r.stop for r in responses} == {"eos", "length"}
    assert all((r.response_ids[-1] == END) == (r.stop == "eos") for r in responses)
    asked = server.record()["requests"]
    assert sorted(tuple(r["prompt"]) for r in asked) == sorted(p.ids for p in prompts), "each prompt is asked once"
    one = next(r for r in asked if tuple(r["prompt"]) == prompts[5].ids)
    assert one["seed"] == row_seed(SAMPLING, "teacher", "p5") % 2**31
    assert (one["temperature"], one["top_p"], one["top_k"], one["max_tokens"], one["min_p"]) == (0.7, 0.9, 5, 8, 0.0)
    assert "logprobs" not in asked[-1], "what is not needed is not computed"


@pytest.mark.parametrize("manner", ["older vllm", "llama.cpp", "older llama.cpp"])
def test_ids_that_come_with_the_log_probabilities(sampler: ServedSampler, server: FakeServer, manner: str) -> None:
    server.order(manner=manner)
    prompts = prompts_of(sampler)
    served = served_of(sampler, prompts)
    assert [one.response.response_ids for one in served] == [drawn(p) for p in prompts]
    assert not any(one.reencoded for one in served)


@pytest.mark.parametrize("manner", ["vllm", "older vllm", "llama.cpp", "older llama.cpp"])
def test_log_probabilities_are_kept(sampler: ServedSampler, server: FakeServer, manner: str) -> None:
    server.order(manner=manner)
    for response in replace(sampler, keep_logp=True).respond(prompts_of(sampler), SAMPLING):
        assert response.logp == tuple(-(i % 7) / 8 for i in response.response_ids)


def test_lacking_log_probabilities_are_an_error(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(logprobs=False)
    with pytest.raises(LimbeckError, match=r"no log-probabilities .* vLLM"):
        replace(sampler, keep_logp=True).respond(prompts_of(sampler), SAMPLING)
    assert sampler.respond(prompts_of(sampler, 3), SAMPLING), "fine where nobody asked for them"


def test_an_end_the_server_left_out_is_put_back(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(sends_end=False)
    prompts = prompts_of(sampler)
    assert [r.response_ids for r in sampler.respond(prompts, SAMPLING)] == [drawn(p) for p in prompts]
    with pytest.raises(LimbeckError, match="no log-probabilities"):
        replace(sampler, keep_logp=True).respond(prompts, SAMPLING)


def test_what_is_done_is_not_asked_again(sampler: ServedSampler, server: FakeServer) -> None:
    prompts = prompts_of(sampler)
    served = served_of(sampler, prompts, done={0, 1, 5, 11})
    assert [one.index for one in served] == [2, 3, 4, 6, 7, 8, 9, 10]
    assert len(server.record()["requests"]) == 8
    assert served_of(sampler, prompts, done=range(12)) == []
    assert len(server.record()["requests"]) == 8


def test_requests_are_under_way_together(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(delay_s=0.3)
    started = time.monotonic()
    replace(sampler, concurrency=6).respond(prompts_of(sampler, 13), SAMPLING)
    seconds = time.monotonic() - started
    # One that finds the manner, and twelve in two waves of six, instead of thirteen after each other.
    assert 0.9 < seconds < 2.6 and server.record()["most"] == 6


def test_answers_come_as_they_are_there(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(delay_s=0.1)
    answers: Any = sampler.respond_as_they_come(prompts_of(sampler), SAMPLING)
    assert next(answers).index == 0 and len(server.record()["requests"]) == 1
    next(answers)
    assert len(server.record()["answered"]) < 12
    answers.close()
    time.sleep(0.3)
    assert len(server.record()["requests"]) < 12, "nothing is begun once nobody listens"
