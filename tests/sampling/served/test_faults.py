"""A server that is down, slow, full, broken, or says no."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from limbeck.sampling.served import ServedSampler
from limbeck.types import LimbeckError
from tests.sampling.served.asking import SAMPLING, at, drawn, prompts_of, with_options
from tests.sampling.served.fake_server import FakeServer

PASSING = [
    {"status": 429, "headers": {"Retry-After": "0"}},
    {"status": 503},
    "hang up",
    "cut",
    "garbage",
]


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_passes_is_tried_again(sampler: ServedSampler, server: FakeServer, fault: Any) -> None:
    server.order(faults=[fault, None, None, fault, fault])
    prompts = prompts_of(sampler)
    assert [r.response_ids for r in sampler.respond(prompts, SAMPLING)] == [drawn(p) for p in prompts]
    record = server.record()
    assert len(record["requests"]) == 15 and len(record["answered"]) == 12


def test_retry_after_is_honoured(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(faults=[{"status": 429, "headers": {"Retry-After": "1"}}])
    started = time.monotonic()
    sampler.respond(prompts_of(sampler, 1), SAMPLING)
    assert time.monotonic() - started >= 1
    server.order(faults=[{"status": 429, "headers": {"Retry-After": "90000"}}])
    with pytest.raises(LimbeckError, match=r"HTTP 429: as ordered\) and asks to wait 90000 s; lower"):
        sampler.respond(prompts_of(sampler, 1), SAMPLING)


LASTING = [
    ("garbage", r"answers '<html>It works!</html>', expected a JSON object \(3 tries\); check that .*base_url"),
    ("cut", r"cut the connection off in the middle of an answer \(3 tries\); look at the server's log"),
    ("hang up", r"cut the connection off"),
    ({"status": 500, "body": "line\n two"}, r"cannot answer \(HTTP 500: line two\) \(3 tries\)"),
    ({"status": 301, "headers": {"Location": "http://elsewhere/v1"}}, r"redirects to http://elsewhere/v1; give that"),
    ({"status": 200, "body": {"choices": []}}, r"answers \{\"choices\": \[\]\}, expected choices with a finish_reason"),
    ({"status": 200, "body": {"choices": [{"finish_reason": "stop"}]}}, r"expected a text"),
    ({"status": 200, "body": {"choices": [{"finish_reason": "stop", "text": "\ud83d"}]}}, r"half of a surrogate pair"),
    (
        {"status": 200, "body": {"choices": [{"finish_reason": "content_filter", "text": ""}]}},
        r"finish_reason 'content_filter', expected stop or length; drop the prompt",
    ),
    (
        {"status": 200, "body": {"choices": [{"finish_reason": "stop", "token_ids": [7, 70000]}]}},
        r"ids from 7 to 70000, expected 0 to \d+: .* serve the teacher",
    ),
    (
        {"status": 200, "body": {"choices": [{"finish_reason": "stop", "token_ids": [7], "prompt_token_ids": [1]}]}},
        r"read its \d+ tokens as 1 others",
    ),
    (
        {
            "status": 200,
            "body": {"choices": [{"finish_reason": "stop", "message": {"content": "", "reasoning_content": "Hm"}}]},
        },
        r"took reasoning_content out of the answer",
    ),
]


@pytest.mark.parametrize(("fault", "said"), LASTING, ids=lambda value: str(value)[:60])
def test_what_lasts_is_said_in_one_line(sampler: ServedSampler, server: FakeServer, fault: Any, said: str) -> None:
    server.order(faults=[fault] * 3)
    with pytest.raises(LimbeckError, match=said) as caught:
        sampler.respond(prompts_of(sampler, 2), SAMPLING)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"delay_s": 3.0}, {"faults": ["drip", "drip", "drip"]}], ids=str)
def test_slow_is_an_error(sampler: ServedSampler, server: FakeServer, settings: Any) -> None:
    server.order(**settings)
    hasty = with_options(sampler, timeout_s=0.3, retries=1)
    started = time.monotonic()
    with pytest.raises(LimbeckError, match=r"did not answer within 0\.3 s \(2 tries\); raise .*timeout_s"):
        hasty.respond(prompts_of(sampler, 1), SAMPLING)
    assert time.monotonic() - started < 2


def test_down_is_an_error(sampler: ServedSampler, mortal: FakeServer) -> None:
    sampler = at(sampler, mortal)
    mortal.stop()
    with pytest.raises(LimbeckError, match=r"cannot be reached \(Connection refused\) \(3 tries\); start the server"):
        sampler.respond(prompts_of(sampler, 1), SAMPLING)


def test_going_down_in_the_middle_keeps_what_is_there(sampler: ServedSampler, mortal: FakeServer) -> None:
    sampler, got = at(sampler, mortal), []
    with pytest.raises(LimbeckError, match=r"cannot be reached|cut the connection off"):
        for one in sampler.respond_as_they_come(prompts_of(sampler), SAMPLING):
            got.append(one.index)
            if len(got) == 5:
                mortal.stop()
    assert 5 <= len(got) < 12 and len(set(got)) == len(got)


def test_one_failure_lets_the_others_finish(sampler: ServedSampler, server: FakeServer) -> None:
    server.order(delay_s=0.2, faults=[None, {"status": 400, "body": {"error": {"message": "prompt is too long"}}}])
    got = []
    with pytest.raises(LimbeckError, match=r"declines \(HTTP 400: prompt is too long\)"):
        for one in sampler.respond_as_they_come(prompts_of(sampler), SAMPLING):
            got.append(one.response.prompt_ids)
    answered = server.record()["answered"]
    assert sorted(got) == sorted(tuple(ids) for ids in answered), "nothing that was answered is lost"
    assert 4 <= len(got) < 11, "and little is begun after the failure"


def test_an_unknown_model_is_declined(sampler: ServedSampler) -> None:
    with pytest.raises(
        LimbeckError, match=r"declines to answer prompt p0 \(HTTP 404: The model `x` does not exist\.\)"
    ):
        replace(sampler, model="x").respond(prompts_of(sampler, 1), SAMPLING)
